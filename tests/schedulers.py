"""diffusers' schedulers and k-diffusion's samplers, stepping through a Schedule of ours, over scaled latents in fp64.

Their own tables are fp32: so that 1e-6 can be asked of whole trajectories, ours are put in their place. That these are
the same, to fp32, is a test of its own. Each function is named as the sampler that it is to equal.
"""

import functools
import importlib.util
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from bench.reference.oracles import SCHEDULE
from sd.schedules import Schedule, alphas_cumprod, sigmas_of

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]
Trajectory = Iterator[Tensor]
BETAS = {key: value for key, value in SCHEDULE.items() if key != "clip_sample"}


def float64(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Float64:
    """torch, for a module that asks for float32 by name: some schedulers round what they are given."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


@contextmanager
def in_float64(scheduler, noise: Noise) -> Iterator[None]:
    """Within this the scheduler's module knows no fp32, and draws our noise."""
    module = sys.modules[type(scheduler).__module__]
    with mock.patch.multiple(module, create=True, torch=Float64(), randn_tensor=lambda shape, **_: noise()):
        yield


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Within this, modules that are imported find these, empty. What they import stays."""
    missing = [name for name in names if name not in sys.modules]
    sys.modules.update({name: types.SimpleNamespace(odeint=None) for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


# ---- over abar: DDPM, DDIM, PNDM, LCM, TCD


def over_abar(scheduler, schedule: Schedule, denoise: Denoise, x: Tensor, noise: Noise, **options) -> Trajectory:
    """Those that read alphas_cumprod at whole timesteps."""
    scheduler.alphas_cumprod = float64(schedule.table)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.one = float64(1.0)
    scheduler.num_inference_steps = len(schedule)
    scheduler.timesteps = torch.tensor(schedule.timesteps)
    scheduler.custom_timesteps = True
    for t in scheduler.timesteps:
        with in_float64(scheduler, noise):
            x = scheduler.step(denoise(x, t.item()), t, x, **options).prev_sample
        yield x


def ddpm(schedule: Schedule, denoise: Denoise, x: Tensor, noise: Noise) -> Trajectory:
    return over_abar(DDPMScheduler(**SCHEDULE, variance_type="fixed_small"), schedule, denoise, x, noise)


def ddim(schedule: Schedule, denoise: Denoise, x: Tensor, noise: Noise, eta: float = 0.0) -> Trajectory:
    scheduler = DDIMScheduler(**SCHEDULE, set_alpha_to_one=False)
    scheduler._get_variance = lambda t, prev: _ddim_variance(schedule, t)
    # It steps by 1000 // steps, whatever the schedule: one step of it a step of ours.
    for i in range(len(schedule)):
        here = Schedule(schedule.timesteps[i : i + 1], schedule.abars[i : i + 2], schedule.table)
        scheduler.final_alpha_cumprod = None
        x = _ddim_step(scheduler, here, schedule, i, denoise, x, noise, eta)
        yield x


def _ddim_variance(schedule: Schedule, t: Tensor) -> Tensor:
    i = schedule.timesteps.index(t.item())
    after = schedule.abars[i + 1] if i + 1 < len(schedule) else schedule.table[0]
    return float64((1 - after) / (1 - schedule.abars[i]) * (1 - schedule.abars[i] / after))


def _ddim_step(scheduler, here, schedule, i, denoise, x, noise, eta) -> Tensor:
    t = schedule.timesteps[i]
    scheduler.alphas_cumprod = float64(schedule.table)
    after = schedule.abars[i + 1] if i + 1 < len(schedule) else schedule.table[0]
    scheduler.final_alpha_cumprod = float64(after)
    scheduler.num_inference_steps = 1  # one step of 1000: what is before it is final_alpha_cumprod
    eps = denoise(x, t)
    noises = {"variance_noise": noise()} if eta > 0 else {}
    return scheduler.step(eps, torch.tensor(t), x, eta=eta, **noises).prev_sample


def plms(schedule: Schedule, denoise: Denoise, x: Tensor, noise: Noise) -> Trajectory:
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False)
    scheduler.set_timesteps(len(schedule))
    scheduler.alphas_cumprod = float64(schedule.table)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(denoise(x, t.item()), t, x).prev_sample
        if i != 0 or len(schedule) == 1:  # its first two are our first
            yield x


def lcm(schedule: Schedule, denoise: Denoise, x: Tensor, noise: Noise) -> Trajectory:
    scheduler = LCMScheduler(**{**SCHEDULE, "steps_offset": 0}, set_alpha_to_one=False)
    scalings = scheduler.get_scalings_for_boundary_condition_discrete
    scheduler.get_scalings_for_boundary_condition_discrete = lambda t: scalings(t.double())
    return over_abar(scheduler, schedule, denoise, x, noise)


def tcd(schedule: Schedule, denoise: Denoise, x: Tensor, noise: Noise, eta: float = 0.3) -> Trajectory:
    scheduler = TCDScheduler(**{**SCHEDULE, "steps_offset": 0}, set_alpha_to_one=False)
    return over_abar(scheduler, schedule, denoise, x, noise, eta=eta)


# ---- over x / alpha, which starts at sigma


def over_sigma(scheduler, schedule: Schedule, denoise: Denoise, x: Tensor, noise: Noise, twice: bool) -> Trajectory:
    """Euler, Heun and those like them. twice: a step is two of theirs, but for the last."""
    x = x * (schedule.sigmas[0] ** 2 + 1) ** 0.5
    done = 0
    for i, t in enumerate(scheduler.timesteps):
        with in_float64(scheduler, noise):
            eps = denoise(scheduler.scale_model_input(x, t), t.item())
            x = scheduler.step(eps, t, x).prev_sample
        if not twice or i % 2 == 1 or i == len(scheduler.timesteps) - 1:
            done += 1
            yield x / (schedule.sigmas[done] ** 2 + 1) ** 0.5


def _prepared(scheduler, schedule: Schedule, steps: int | None = None):
    scheduler.set_timesteps(max(2, len(schedule)))
    scheduler.num_inference_steps = steps or len(schedule)
    scheduler.sigmas, scheduler.timesteps = float64(schedule.sigmas), float64(schedule.timesteps)
    return scheduler


def _doubled(values) -> Tensor:
    values = float64(values)
    return torch.cat([values[:1], values[1:].repeat_interleave(2)])


def euler(schedule: Schedule, denoise: Denoise, x: Tensor, noise: Noise) -> Trajectory:
    return over_sigma(_prepared(EulerDiscreteScheduler(**BETAS), schedule), schedule, denoise, x, noise, twice=False)


def euler_a(schedule: Schedule, denoise: Denoise, x: Tensor, noise: Noise) -> Trajectory:
    scheduler = _prepared(EulerAncestralDiscreteScheduler(**BETAS), schedule)
    return over_sigma(scheduler, schedule, denoise, x, noise, twice=False)


def lms(schedule: Schedule, denoise: Denoise, x: Tensor, noise: Noise) -> Trajectory:
    return over_sigma(_prepared(LMSDiscreteScheduler(**BETAS), schedule), schedule, denoise, x, noise, twice=False)


def heun(schedule: Schedule, denoise: Denoise, x: Tensor, noise: Noise) -> Trajectory:
    scheduler = _prepared(HeunDiscreteScheduler(**BETAS), schedule)
    scheduler.timesteps = _doubled(schedule.timesteps)
    scheduler.sigmas = torch.cat([_doubled(schedule.sigmas[:-1]), float64([0.0])])
    return over_sigma(scheduler, schedule, denoise, x, noise, twice=True)


def dpm2(schedule: Schedule, denoise: Denoise, x: Tensor, noise: Noise) -> Trajectory:
    scheduler = _prepared(KDPM2DiscreteScheduler(**BETAS), schedule)
    sigmas = schedule.sigmas
    middles = [(a * b) ** 0.5 for a, b in itertools.pairwise(sigmas[:-1])]
    times = [t for pair in zip(schedule.timesteps[:-1], map(schedule.timestep_at, middles), strict=True) for t in pair]
    scheduler.timesteps = float64([*times, schedule.timesteps[-1]])
    scheduler.sigmas = torch.cat([_doubled(sigmas[:-1]), float64([0.0])])
    # sigmas_interpol[i] is the middle between sigmas i-1 and i of the undoubled list, as the scheduler keeps it.
    doubled = float64([0.0, *middles, 0.0]).repeat_interleave(2)
    scheduler.sigmas_interpol = doubled[1:]
    return over_sigma(scheduler, schedule, denoise, x, noise, twice=True)


def dpmpp_sde(schedule: Schedule, denoise: Denoise, x: Tensor, noise: Noise) -> Trajectory:
    with _without("torchsde"):  # its Brownian tree is not used here
        from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler

    scheduler = _prepared(DPMSolverSDEScheduler(**BETAS), schedule)
    sigmas = schedule.sigmas
    middles = [(a * b) ** 0.5 for a, b in itertools.pairwise(sigmas[:-1])]
    times = [t for pair in zip(schedule.timesteps[:-1], map(schedule.timestep_at, middles), strict=True) for t in pair]
    scheduler.timesteps = float64([*times, schedule.timesteps[-1]])
    scheduler.sigmas = torch.cat([_doubled(sigmas[:-1]), float64([0.0])])
    scheduler.noise_sampler = BrownianPath(noise)
    return over_sigma(scheduler, schedule, denoise, x, noise, twice=True)


class BrownianPath:
    """Of each step the noise up to its middle, then that of the whole step, which holds it."""

    def __init__(self, noise: Noise):
        self.noise, self.first = noise, None

    def __call__(self, sigma: Tensor, to: Tensor) -> Tensor:
        if self.first is None:
            self.first = self.noise() * (sigma - to).abs() ** 0.5
            self.middle = to
            self.second = self.noise()
            return self.first / (sigma - to).abs() ** 0.5
        whole = self.first + self.second * (self.middle - to).abs() ** 0.5
        self.first = None
        return whole / (sigma - to).abs() ** 0.5


# ---- over scaled latents and sigma


def multistep(scheduler, schedule: Schedule, denoise: Denoise, x: Tensor, noise: Noise) -> Trajectory:
    # As their pipelines have it where a picture is started from: all timesteps, and where to begin.
    left_out = (schedule.full or len(schedule)) - len(schedule)
    scheduler.sigmas = torch.cat([scheduler.sigmas[:1].expand(left_out), scheduler.sigmas])
    scheduler.timesteps = torch.cat([scheduler.timesteps[:1].expand(left_out), scheduler.timesteps])
    scheduler.set_begin_index(left_out)
    for t in scheduler.timesteps[left_out:]:
        with in_float64(scheduler, noise):
            x = scheduler.step(denoise(x, t.item()), t, x).prev_sample
        yield x


def _dpm(schedule, denoise, x, noise, algorithm: str, order: int) -> Trajectory:
    made = DPMSolverMultistepScheduler(**BETAS, algorithm_type=algorithm, solver_order=order)
    return multistep(_prepared(made, schedule), schedule, denoise, x, noise)


def dpmpp_2m(schedule, denoise, x, noise, solver_order: int = 2) -> Trajectory:
    return _dpm(schedule, denoise, x, noise, "dpmsolver++", solver_order)


def dpmpp_2m_sde(schedule, denoise, x, noise) -> Trajectory:
    return _dpm(schedule, denoise, x, noise, "sde-dpmsolver++", 2)


def unipc(schedule, denoise, x, noise, solver_order: int = 2) -> Trajectory:
    made = UniPCMultistepScheduler(**BETAS, solver_order=solver_order, final_sigmas_type="zero")
    return multistep(_prepared(made, schedule), schedule, denoise, x, noise)


def deis(schedule, denoise, x, noise, solver_order: int = 2) -> Trajectory:
    scheduler = _prepared(DEISMultistepScheduler(**BETAS, solver_order=solver_order), schedule)
    last = ((1 - schedule.table[0]) / schedule.table[0]) ** 0.5
    scheduler.sigmas = float64([*schedule.sigmas[:-1], last])
    return multistep(scheduler, schedule, denoise, x, noise)


# ---- k-diffusion


def k_diffusion(function: str, schedule: Schedule, denoise: Denoise, x: Tensor, noise: Noise, **options) -> Tensor:
    """The last latents of `k_diffusion.sampling.sample_FUNCTION`."""
    sigmas = schedule.sigmas

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.flatten()[0].item()
        near = [i for i, other in enumerate(sigmas[:-1]) if abs(other - level) < 1e-12 * level]
        t = schedule.timesteps[near[0]] if near else schedule.timestep_at(level)
        return x - level * denoise(x / (level**2 + 1) ** 0.5, t)

    if options:
        options["noise_sampler"] = BrownianPath(noise) if function == "dpmpp_sde" else lambda sigma, to: noise()
    start = x * (sigmas[0] ** 2 + 1) ** 0.5
    return getattr(_of_k_diffusion("sampling"), f"sample_{function}")(
        model, start, float64(sigmas), disable=True, **options
    )


def k_diffusion_sigmas(steps: int) -> Tensor:
    """`DiscreteSchedule.get_sigmas` of Stable Diffusion's noise levels: [steps + 1], the last is 0."""
    return _of_k_diffusion("external").DiscreteSchedule(float64(sigmas_of(alphas_cumprod())), False).get_sigmas(steps)


@functools.cache
def _of_k_diffusion(name: str) -> types.ModuleType:
    """One of its modules alone: the package imports what it needs for training."""
    folder = Path(importlib.util.find_spec("k_diffusion").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location(f"k_diffusion.{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    utils = types.SimpleNamespace(append_dims=lambda x, n: x[(..., *[None] * (n - x.ndim))])
    package = types.SimpleNamespace(utils=utils, __path__=[])
    if name != "sampling":
        package.sampling = _of_k_diffusion("sampling")
    with _without("torchdiffeq", "torchsde"), mock.patch.dict(sys.modules, {"k_diffusion": package}):
        spec.loader.exec_module(module)
    return module

"""Samplers: how latents get from one noise level to the next. Functions of a denoiser that know no model.

    ddpm euler_a dpmpp_2m_sde dpmpp_sde dpmpp_3m_sde lcm tcd    draw noise on the way; the others do not
    heun dpm2 dpmpp_sde                                         call the network twice a step; plms once more in all

Each is a generator as sd/ddpm.py describes them, registered by `@sampler` with what `--list-samplers` says of it. Those
that look at the predicted picture instead of the noise stand in sd/solvers.py.
Written over scaled latents x = alpha * x0 + s * eps of variance about 1, where alpha^2 = abar and s^2 = 1 - abar; where
a paper is written over x / alpha, the noise beside it being sigma = s / alpha, `_step` does one step of it.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from sd import solvers
from sd.ddpm import ddpm, predict_x0
from sd.nearest import there_are
from sd.schedules import SCHEDULES, Schedule, abar_of
from sd.solvers import ancestral, noised

if TYPE_CHECKING:
    from torch import Tensor

    from sd.ddpm import Denoise, Noise

OPTIONS = ("eta", "s_noise", "solver_order")
"""What a sampler may take beside its schedule; each says by its arguments which."""

RANGES = {"eta": (0, 1), "s_noise": (0, 10)}
"""From where to where the numbers among them go: beyond, a variance is negative or a picture noise."""


# ---- what a sampler is


@dataclass(frozen=True)
class Method:
    """A sampler's function and what is said of it. calls: of the network a step. schedule: the one it has by itself."""

    name: str
    function: Callable[..., Iterator]
    summary: str
    calls: int = 1
    schedule: str = "leading"
    aliases: tuple[str, ...] = ()
    orders: int = 0

    @property
    def defaults(self) -> dict[str, float]:
        """The options that it takes, and what they are unless they are given."""
        arguments = inspect.signature(self.function).parameters
        return {name: arguments[name].default for name in OPTIONS if name in arguments}


@dataclass(frozen=True)
class Sampler:
    """A method with its options chosen: `sampler(denoise, x, schedule, noise)`. Two that do the same are equal."""

    method: Method
    options: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        return self.method.name

    def __call__(self, denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise) -> Iterator[Tensor]:
        return self.method.function(denoise, x, schedule, noise, **dict(self.options))


SAMPLERS: dict[str, Method] = {}
"""By name, in the order in which they are listed."""


def sampler(summary: str, name: str = "", **about: object) -> Callable[[Callable], Callable]:
    """Registers a function under its name. about: the other fields of Method."""

    def register(function: Callable) -> Callable:
        method = Method(name or function.__name__, function, summary, **about)
        SAMPLERS[method.name] = method
        return function

    return register


def choose(name: str, options: Mapping[str, float | None] | None = None) -> Sampler:
    """The sampler of this name with these options, None being its own. Raises ValueError for what it does not take."""
    method = SAMPLERS[read(name)[0]]
    given = {key: value for key, value in (options or {}).items() if value is not None}
    if unknown := [key for key in given if key not in method.defaults]:
        takes = f"it takes {', '.join(method.defaults)}" if method.defaults else "it takes no such options"
        raise ValueError(f"the sampler {method.name} has no {unknown[0]}; {takes}")
    for key, (low, high) in RANGES.items():
        if not low <= given.get(key, low) <= high:
            raise ValueError(f"{key} must be from {low} to {high}, not {given[key]}")
    if given.get("solver_order", 1) not in range(1, max(1, method.orders) + 1):
        raise ValueError(
            f"solver_order of {method.name} must be from 1 to {method.orders}, not {given['solver_order']}"
        )
    return Sampler(method, tuple(sorted(given.items())))


def schedule_of(name: str, schedule: str | None) -> str:
    """The schedule that is named, or that a sampler's name holds, or that it has by itself. Raises ValueError."""
    name, named = read(name)
    return read_schedule(schedule) if schedule else named or SAMPLERS[name].schedule


def read(text: str) -> tuple[str, str | None]:
    """A sampler's name, and the schedule that the text names with it: `DPM++ 2M Karras` -> dpmpp_2m, karras.

    Capitals, blanks and signs between words mean nothing. Raises ValueError for what is no sampler.
    """
    squeezed = _squeezed(_text("sampler", text))
    for ending, schedule in (("", None), *_schedule_words().items()):
        name = _sampler_words().get(squeezed.removesuffix(ending)) if squeezed.endswith(ending) else None
        if name:
            return name, schedule
    raise ValueError(f"no sampler {text!r}{there_are(text, SAMPLERS)}")


def read_schedule(text: str) -> str:
    """A schedule's name, however it is written. Raises ValueError for what is none."""
    if name := _schedule_words().get(_squeezed(_text("schedule", text))):
        return name
    raise ValueError(f"no schedule {text!r}{there_are(text, SCHEDULES)}")


def _text(kind: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{kind} must be text, not {type(value).__name__}")
    return value


def _squeezed(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower().replace("++", "pp"))


def _sampler_words() -> dict[str, str]:
    return {_squeezed(word): one.name for one in SAMPLERS.values() for word in (one.name, *one.aliases)}


@cache
def _schedule_words() -> dict[str, str]:
    return {_squeezed(name): name for name in SCHEDULES} | {
        "ddim": "leading",  # these three as AUTOMATIC1111's web UI calls them
        "uniform": "linspace",
        "normal": "linspace",
        "ays": "align_your_steps",
    }


def listing() -> str:
    """All samplers and schedules as a table, for people."""
    rows = [("SAMPLER", "CALLS A STEP", "OPTIONS", "WHAT IT DOES")]
    for one in SAMPLERS.values():
        options = ", ".join(f"{name}={value:g}" for name, value in one.defaults.items())
        rows.append((one.name, str(one.calls), options, one.summary))
    rows += [("", "", "", ""), ("SCHEDULE", "", "", "")]
    rows += [(name, "", "", (function.__doc__ or "").split("\n")[0]) for name, function in SCHEDULES.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


# ---- the two of Stable Diffusion's first release, and PLMS

sampler("ancestral sampling, the original", schedule="leading")(ddpm)


@sampler("deterministic; with eta 1 as noisy as ddpm")
def ddim(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise, eta: float = 0.0) -> Iterator[Tensor]:
    """Song et al. 2020, equations 12 and 16. eta 0 draws no noise.

    x [B, C, H, W]. The last step goes to abar[0], not to 1: SD's `set_alpha_to_one` is false.
    """
    levels = _to_first_timestep(schedule)
    for i, t in enumerate(schedule.timesteps):
        abar, abar_prev = levels[i : i + 2]
        eps = denoise(x, t)
        variance = eta**2 * (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
        x = abar_prev**0.5 * predict_x0(x, eps, abar) + (1 - abar_prev - variance) ** 0.5 * eps
        if variance > 0:
            x = x + variance**0.5 * noise()
        yield x


def _to_first_timestep(schedule: Schedule) -> tuple[float, ...]:
    """The schedule's levels, ending at that of the first timestep of training and not at a clean picture."""
    return (*schedule.abars[:-1], schedule.table[0])


@sampler("the slope over four steps; one call more in all", aliases=("pndm",))
def plms(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise) -> Iterator[Tensor]:
    """DDIM's step along a slope of up to four steps (Liu et al. 2022, equations 12 and 13, without Runge-Kutta).

    The first step is taken twice, the second time along the mean of the slopes at both of its ends.
    """
    levels = _to_first_timestep(schedule)
    slopes: list[Tensor] = []
    for i, t in enumerate(schedule.timesteps):
        slopes = [*slopes[-3:], denoise(x, t)]
        before, x = x, _ddim_step(x, _adams_bashforth(slopes), *levels[i : i + 2])
        if i == 0 and len(schedule) > 1:
            x = _ddim_step(before, (denoise(x, schedule.timesteps[1]) + slopes[0]) / 2, *levels[:2])
        yield x


def _ddim_step(x: Tensor, eps: Tensor, abar: float, abar_prev: float) -> Tensor:
    return abar_prev**0.5 * predict_x0(x, eps, abar) + (1 - abar_prev) ** 0.5 * eps


def _adams_bashforth(slopes: list[Tensor]) -> Tensor:
    """The latest slope carried on over equal steps, by as many as there are."""
    shares = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))[
        len(slopes) - 1
    ]
    return sum(share * slope for share, slope in zip(shares, reversed(slopes), strict=True))


# ---- steps along a slope in sigma (Karras et al. 2022)


def _step(x: Tensor, slope: Tensor, sigma: float, to: float) -> Tensor:
    """One step of d(x / alpha) = slope * d sigma, over scaled latents."""
    return (abar_of(to) / abar_of(sigma)) ** 0.5 * x + abar_of(to) ** 0.5 * (to - sigma) * slope


@sampler("one slope a step; the same as ddim but for its end", aliases=("k_euler",))
def euler(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise) -> Iterator[Tensor]:
    """Karras et al. 2022, algorithm 2 without churn and second slope."""
    for t, sigma, to in _steps(schedule):
        x = _step(x, denoise(x, t), sigma, to)
        yield x


def _steps(schedule: Schedule) -> Iterator[tuple[float, float, float]]:
    """Of each step the timestep, and sigma before and after."""
    return zip(schedule.timesteps, schedule.sigmas[:-1], schedule.sigmas[1:], strict=True)


@sampler("euler with fresh noise at each step", aliases=("euler_ancestral", "k_euler_a"))
def euler_a(
    denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Tensor]:
    """Each step goes below its level, and up again by fresh noise (k-diffusion's ancestral sampling, as DDPM's)."""
    for t, sigma, to in _steps(schedule):
        down, up = ancestral(sigma, to, eta)
        x = noised(_step(x, denoise(x, t), sigma, down), down, to, up * s_noise, noise)
        yield x


@sampler("the mean of the slopes at both ends", calls=2)
def heun(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise) -> Iterator[Tensor]:
    """Karras et al. 2022, algorithm 1. The last step, to a clean picture, has one slope only."""
    for i, (t, sigma, to) in enumerate(_steps(schedule)):
        slope = denoise(x, t)
        ahead = _step(x, slope, sigma, to)
        if to > 0:
            ahead = _step(x, (slope + denoise(ahead, schedule.timesteps[i + 1])) / 2, sigma, to)
        x = ahead
        yield x


@sampler("the slope in the middle", calls=2, aliases=("k_dpm_2", "kdpm2"))
def dpm2(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise) -> Iterator[Tensor]:
    """DPM-Solver-2 as in Karras et al. 2022, appendix: the slope in the middle of log sigma. The last step has one."""
    for t, sigma, to in _steps(schedule):
        slope = denoise(x, t)
        if to > 0:
            middle = (sigma * to) ** 0.5
            slope = denoise(_step(x, slope, sigma, middle), schedule.timestep_at(middle))
        x = _step(x, slope, sigma, to)
        yield x


@sampler("a polynomial through the last four slopes", orders=4, aliases=("k_lms",))
def lms(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise, solver_order: int = 4) -> Iterator[Tensor]:
    """The linear multistep method: the polynomial in sigma through the last slopes, integrated over the step."""
    slopes: list[Tensor] = []
    for i, (t, sigma, to) in enumerate(_steps(schedule)):
        slopes = [denoise(x, t), *slopes[: solver_order - 1]]
        nodes = [schedule.sigmas[i - j] for j in range(len(slopes))]
        shares = [lagrange_integral(nodes, j, sigma, to) for j in range(len(nodes))]
        slope = sum(share * slope for share, slope in zip(shares, slopes, strict=True)) / (to - sigma)
        x = _step(x, slope, sigma, to)
        yield x


def lagrange_integral(nodes: list[float], j: int, low: float, high: float) -> float:
    """Over [low, high] of the polynomial that is 1 at nodes[j] and 0 at the others; by Gauss's quadrature, exact."""
    middle, half = (low + high) / 2, (high - low) / 2
    total = 0.0
    for place, weight in ((0.8611363115940526, 0.34785484513745385), (0.33998104358485626, 0.6521451548625461)):
        for at in (middle - half * place, middle + half * place):
            total += weight * math.prod((at - n) / (nodes[j] - n) for k, n in enumerate(nodes) if k != j)
    return half * total


# ---- those of solvers.py

sampler("second order from the last step's picture", aliases=("dpmsolver++", "dpm++ 2m"), orders=3)(solvers.dpmpp_2m)
sampler("the same with fresh noise", aliases=("dpm++ 2m sde",))(solvers.dpmpp_2m_sde)
sampler("second order by a call in the middle, with fresh noise", calls=2, aliases=("dpm++ sde",))(solvers.dpmpp_sde)
sampler("third order from the last two, with fresh noise", aliases=("dpm++ 3m sde",))(solvers.dpmpp_3m_sde)
sampler("predicts, and corrects by the next call", aliases=("uni_pc", "uni_pc_bh2"), orders=3)(solvers.unipc)
sampler("the noise's polynomial in log sigma", orders=3)(solvers.deis)
sampler("for LCM's models and LoRA: 2 to 8 steps", schedule="lcm")(solvers.lcm)
sampler("for TCD's models and LoRA: 2 to 8 steps", schedule="lcm")(solvers.tcd)

"""The noise schedule of Stable Diffusion 1.x, and DDPM (Ho et al. 2020), its ancestral sampler.

A sampler here is a generator: `sampler(denoise, x, timesteps, noise)` yields the latents after each step. It knows no
model: `denoise(x, t)` returns the noise predicted in x, `noise()` fresh Gaussian noise shaped like x. All coefficients
are Python floats computed in double precision, so that a step never waits for the device.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[], Tensor]

TRAIN_STEPS = 1000


@cache
def alphas_cumprod() -> tuple[float, ...]:
    """abar[t], the share of the picture's variance that is left at timestep t; 1000 of them, falling from 0.99915.

    The betas are "scaled linear": linear in their square root, from 0.00085 to 0.012.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    return tuple((1 - betas).cumprod(0).tolist())


def spaced_timesteps(steps: int) -> list[int]:
    """The timesteps that `steps` steps visit, falling: every (1000 // steps)-th, plus the one by which SD is offset.

    Raises ValueError unless 1 <= steps <= 1000. 50 steps: 981, 961, ..., 1.
    """
    if not 1 <= steps <= TRAIN_STEPS:
        raise ValueError(f"steps must be from 1 to {TRAIN_STEPS}, not {steps}")
    stride = TRAIN_STEPS // steps
    offset = 1 if steps < TRAIN_STEPS else 0  # timestep 1000 does not exist
    return [i * stride + offset for i in reversed(range(steps))]


def add_noise(x: Tensor, noise: Tensor, t: int) -> Tensor:
    """The forward process: clean latents x as they look at timestep t (Ho et al. 2020, equation 4)."""
    abar = alphas_cumprod()[t]
    return abar**0.5 * x + (1 - abar) ** 0.5 * noise


def predict_x0(x: Tensor, eps: Tensor, abar: float) -> Tensor:
    """The clean latents, if eps is the noise in x (Ho et al. 2020, equation 15)."""
    return (x - (1 - abar) ** 0.5 * eps) / abar**0.5


def device_timesteps(timesteps: Sequence[int], device: torch.device) -> Tensor:
    """All timesteps, copied to the device once: a copy a step would make the host wait for the device."""
    return torch.tensor(timesteps, dtype=torch.int64, device=device)


def ddpm(denoise: Denoise, x: Tensor, timesteps: Sequence[int], noise: Noise) -> Iterator[Tensor]:
    """Each step samples the posterior q(x_prev | x, x0) (Ho et al. 2020, equations 6 and 7, fixed-small variance).

    x [B, C, H, W], noise of variance 1 (or a picture noised to timesteps[0]); timesteps falling.
    The variance is the posterior's between the timesteps visited, not betas[t], which holds for 1000 steps only.
    """
    abar = alphas_cumprod()
    ts = device_timesteps(timesteps, x.device)
    for i, t in enumerate(timesteps):
        abar_t = abar[t]
        abar_prev = abar[timesteps[i + 1]] if i + 1 < len(timesteps) else 1.0
        alpha = abar_t / abar_prev
        x0 = predict_x0(x, denoise(x, ts[i]), abar_t)
        x0_share = abar_prev**0.5 * (1 - alpha) / (1 - abar_t)
        x_share = alpha**0.5 * (1 - abar_prev) / (1 - abar_t)
        x = x0_share * x0 + x_share * x
        variance = (1 - abar_prev) / (1 - abar_t) * (1 - alpha)
        if t > 0:
            x = x + max(variance, 1e-20) ** 0.5 * noise()
        yield x

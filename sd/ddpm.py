"""DDPM (Ho et al. 2020): how training adds noise, and the ancestral sampler that takes it away.

A sampler here is a generator: `sampler(denoise, x, schedule, noise)` yields the latents after each step, and goes on
from what it yielded, which may be written to before the next. It knows no model: `denoise(x, t)` returns the noise
predicted in x at timestep t, a number; `noise()` fresh Gaussian noise shaped like x. All coefficients are Python floats
computed in double precision, so that a step never waits for the device. Nothing imports torch before it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from sd.schedules import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    Denoise = Callable[[Tensor, float], Tensor]
    Noise = Callable[[], Tensor]


def add_noise(x: Tensor, noise: Tensor, abar: float) -> Tensor:
    """The forward process: clean latents x as they look where abar of their variance is left (Ho et al. 2020, eq 4)."""
    return abar**0.5 * x + (1 - abar) ** 0.5 * noise


def predict_x0(x: Tensor, eps: Tensor, abar: float) -> Tensor:
    """The clean latents, if eps is the noise in x (Ho et al. 2020, equation 15)."""
    return (x - (1 - abar) ** 0.5 * eps) / abar**0.5


def ddpm(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise) -> Iterator[Tensor]:
    """Each step samples the posterior q(x_prev | x, x0) (Ho et al. 2020, equations 6 and 7, fixed-small variance).

    x [B, C, H, W], noise of variance 1 (or a picture noised to the schedule's first level).
    The variance is the posterior's between the timesteps visited, not betas[t], which holds for 1000 steps only.
    """
    for i, t in enumerate(schedule.timesteps):
        abar_t, abar_prev = schedule.abars[i : i + 2]
        alpha = abar_t / abar_prev
        x0 = predict_x0(x, denoise(x, t), abar_t)
        x0_share = abar_prev**0.5 * (1 - alpha) / (1 - abar_t)
        x_share = alpha**0.5 * (1 - abar_prev) / (1 - abar_t)
        x = x0_share * x0 + x_share * x
        variance = (1 - abar_prev) / (1 - abar_t) * (1 - alpha)
        if t > 0:
            x = x + max(variance, 1e-20) ** 0.5 * noise()
        yield x

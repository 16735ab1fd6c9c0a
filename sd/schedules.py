"""Schedules: at which noise levels a picture is drawn, apart from the sampler that steps between them.

    leading trailing linspace      even timesteps, as SD 1.x was released with, and the two other ways to space them
    karras exponential beta        even in a function of sigma, from the largest noise of training to the smallest
    sgm_uniform align_your_steps   the spacing of Stability's code, and the ten steps of Sabour et al. 2024
    ztsnr lcm                      trailing with no signal at the first step, and what LCM and TCD were distilled at

A level is abar, the share of the picture's variance that is left: 1 is clean. sigma = sqrt((1 - abar) / abar) is the
noise beside a picture that is not scaled down. All are Python floats, computed in double precision: no step waits for
the device. Nothing imports torch before it is called.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

from sd.nearest import there_are

Table = tuple[float, ...]
"""abar of each of the 1000 timesteps of training, falling."""

TRAIN_STEPS = 1000


@cache
def alphas_cumprod() -> tuple[float, ...]:
    """abar[t], the share of the picture's variance that is left at timestep t; 1000 of them, falling from 0.99915.

    The betas are "scaled linear": linear in their square root, from 0.00085 to 0.012.
    """
    import torch

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


@dataclass(frozen=True)
class Schedule:
    """The levels from which and to which each step goes.

    timesteps: what the network is told at the n levels where it is called, falling; all whole numbers, or all floats.
    abars: abar at these, and at last of what comes out: n + 1, the last is 1. table: the levels of training.
    full: the steps of the schedule that this is the end of; 0, it is all of one.
    """

    timesteps: tuple[float, ...]
    abars: tuple[float, ...]
    table: Table = field(compare=False, repr=False)
    full: int = 0

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def sigmas(self) -> tuple[float, ...]:
        return tuple(sigma_of(abar) for abar in self.abars)

    def last(self, steps: int) -> Schedule:
        """Its last steps alone, for a picture that is only noised so far."""
        start = len(self) - steps
        return Schedule(self.timesteps[start:], self.abars[start:], self.table, self.full or len(self))

    def abar_at(self, t: float) -> float:
        """abar at a timestep, one between whole ones too, such as a sampler asks for within a step."""
        if t in self.timesteps:
            return self.abars[self.timesteps.index(t)]
        return abar_of(math.exp(_between(log_sigmas(self.table), t)))

    def timestep_at(self, sigma: float) -> float:
        """The timestep, between whole ones too, at which the noise is sigma: log sigma is linear between two."""
        logs = log_sigmas(self.table)
        low = min(max(bisect(logs, math.log(sigma)) - 1, 0), TRAIN_STEPS - 2)
        share = (math.log(sigma) - logs[low]) / (logs[low + 1] - logs[low])
        return low + min(max(share, 0.0), 1.0)


def sigma_of(abar: float) -> float:
    return ((1 - abar) / abar) ** 0.5


def abar_of(sigma: float) -> float:
    return 1 / (1 + sigma**2)


@cache
def sigmas_of(table: Table) -> tuple[float, ...]:
    return tuple(map(sigma_of, table))


@cache
def log_sigmas(table: Table) -> tuple[float, ...]:
    return tuple(math.log(sigma) for sigma in sigmas_of(table))


@cache
def zero_terminal_snr() -> Table:
    """The levels of training, shifted and scaled so that the last holds no picture (Lin et al. 2023, algorithm 1).

    The last is 2^-24 and not 0, by which a prediction of the noise could not be divided.
    """
    roots = [abar**0.5 for abar in alphas_cumprod()]
    first, last = roots[0], roots[-1]
    return (*(((root - last) * first / (first - last)) ** 2 for root in roots[:-1]), 2.0**-24)


# ---- what a schedule is made of


def at_timesteps(timesteps: Sequence[float], table: Table | None = None) -> Schedule:
    """The levels of these timesteps; between two whole ones sigma is linear."""
    table = table or alphas_cumprod()
    return Schedule(tuple(timesteps), (*(_abar_at(t, table) for t in timesteps), 1.0), table)


def at_sigmas(sigmas: Iterable[float]) -> Schedule:
    """Levels of these sigmas, falling, and the timesteps where the noise of training was that large."""
    table = alphas_cumprod()
    levels = tuple(sigmas)
    found = Schedule((), (*(abar_of(sigma) for sigma in levels), 1.0), table)
    return Schedule(tuple(map(found.timestep_at, levels)), found.abars, table)


def _abar_at(t: float, table: Table) -> float:
    low = min(int(t), TRAIN_STEPS - 2)
    if t in (low, low + 1):
        return table[int(t)]
    sigmas = sigmas_of(table)
    return abar_of(sigmas[low] + (t - low) * (sigmas[low + 1] - sigmas[low]))


def _even(first: float, last: float, count: int) -> list[float]:
    """From first to last, both included; of one, the first."""
    return [first + (last - first) * i / max(1, count - 1) for i in range(count)]


def _ends() -> tuple[float, float]:
    """The largest and the smallest sigma of training: 14.6 and 0.029."""
    sigmas = sigmas_of(alphas_cumprod())
    return sigmas[-1], sigmas[0]


# ---- even in the timestep


def leading(steps: int) -> Schedule:
    """Every (1000 // steps)-th timestep and 1: Stable Diffusion 1.x's own. It does not begin at the largest noise."""
    return at_timesteps(spaced_timesteps(steps))


def trailing(steps: int) -> Schedule:
    """From timestep 999 down, the last step the longest to clean (Lin et al. 2023, table 2)."""
    return at_timesteps(_trailing(steps))


def _trailing(steps: int) -> list[int]:
    # round() takes halves to the even number, as NumPy's does.
    return [round(TRAIN_STEPS - i * TRAIN_STEPS / steps) - 1 for i in range(steps)]


def linspace(steps: int) -> Schedule:
    """From timestep 999 to 0, both included, and between whole ones where the steps fall there."""
    return at_timesteps(_even(TRAIN_STEPS - 1.0, 0.0, steps))


def sgm_uniform(steps: int) -> Schedule:
    """Even timesteps from 999 on, of which the last, at 0, is left out (Stability's generative-models)."""
    logs = log_sigmas(alphas_cumprod())
    times = _even(TRAIN_STEPS - 1.0, 0.0, steps + 1)[:-1]
    return at_sigmas(math.exp(_between(logs, t)) for t in times)


def _between(values: Sequence[float], t: float) -> float:
    low = min(int(t), len(values) - 2)
    return values[low] + (t - low) * (values[low + 1] - values[low])


def ztsnr(steps: int) -> Schedule:
    """`trailing` on levels that end in pure noise, for models trained so (v-prediction)."""
    return at_timesteps(_trailing(steps), zero_terminal_snr())


def lcm(steps: int) -> Schedule:
    """Of the fifty timesteps 999, 979, ..., 19 at which LCM and TCD are distilled, `steps` evenly chosen."""
    origin = range(TRAIN_STEPS - 1, 0, -TRAIN_STEPS // DISTILLED)
    return at_timesteps([origin[i * DISTILLED // steps] for i in range(steps)])


DISTILLED = 50

# ---- even in a function of sigma


def karras(steps: int, rho: float = 7.0) -> Schedule:
    """Even in sigma^(1/7): many steps where there is little noise (Karras et al. 2022, equation 5)."""
    high, low = (sigma ** (1 / rho) for sigma in _ends())
    return at_sigmas(root**rho for root in _even(high, low, steps))


def exponential(steps: int) -> Schedule:
    """Even in log sigma."""
    high, low = map(math.log, _ends())
    return at_sigmas(map(math.exp, _even(high, low, steps)))


def beta(steps: int, alpha: float = 0.6) -> Schedule:
    """Quantiles of a Beta(0.6, 0.6) distribution over sigma: many steps at both ends (Lee et al. 2024)."""
    high, low = _ends()
    return at_sigmas(low + (high - low) * beta_quantile(share, alpha) for share in _even(1.0, 0.0, steps))


def beta_quantile(share: float, alpha: float) -> float:
    """The x up to which a Beta(alpha, alpha) distribution holds this share; by halving, in double precision."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _beta_share(middle, alpha) < share else (low, middle)
    return 1.0 if share == 1 else 0.0 if share == 0 else (low + high) / 2


def _beta_share(x: float, alpha: float) -> float:
    """The regularized incomplete beta function of equal parameters, by its continued fraction (DLMF 8.17.22)."""
    if x <= 0:
        return 0.0
    if x > 0.5:
        return 1 - _beta_share(1 - x, alpha)
    front = math.exp(math.lgamma(2 * alpha) - 2 * math.lgamma(alpha) + alpha * (math.log(x) + math.log1p(-x)))
    fraction = 0.0
    for m in range(24, 0, -1):
        even = m * (alpha - m) * x / ((alpha + 2 * m - 1) * (alpha + 2 * m))
        odd = -(alpha + m) * (2 * alpha + m) * x / ((alpha + 2 * m) * (alpha + 2 * m + 1))
        fraction = even / (1 + odd / (1 + fraction))
    first = -(2 * alpha) * x / (alpha + 1)
    return front / (alpha * (1 + first / (1 + fraction)))


ALIGNED = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


def align_your_steps(steps: int) -> Schedule:
    """Ten levels that Sabour et al. 2024 found for Stable Diffusion 1.5; log sigma is linear between them."""
    logs = [math.log(sigma) for sigma in ALIGNED]
    return at_sigmas(math.exp(_between(logs, at)) for at in _even(0.0, len(ALIGNED) - 1.0, steps + 1)[:-1])


SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    function.__name__: function
    for function in (
        leading, trailing, linspace, karras, exponential, sgm_uniform, beta, align_your_steps, ztsnr, lcm
    )
}  # fmt: skip
"""By name: schedule(steps), 1 to 1000 of them."""


def make(name: str, steps: int) -> Schedule:
    """Raises ValueError for a name that is none, or a number of steps that it cannot have."""
    check(name, steps)
    return SCHEDULES[name](steps)


def check(name: str, steps: int) -> None:
    """Raises ValueError where `make` does, without making anything."""
    if name not in SCHEDULES:
        raise ValueError(f"no schedule {name!r}{there_are(name, SCHEDULES)}")
    if not 1 <= steps <= TRAIN_STEPS:
        raise ValueError(f"steps must be from 1 to {TRAIN_STEPS}, not {steps}")
    if name == "lcm" and steps > DISTILLED:
        raise ValueError(f"the lcm schedule has at most {DISTILLED} steps, not {steps}")

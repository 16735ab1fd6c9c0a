"""Samplers over the predicted picture: exponential integrators, with history or fresh noise, and those of distillation.

In lambda = log(alpha / s) = -log(sigma) the ODE of diffusion is linear but for the picture x0 (Lu et al. 2022): over a
step h of lambda, what x holds beside the picture decays by exp(-h), and a solver chooses how x0 goes on in between.
Written over scaled latents, as in sd/samplers.py, which registers these. m[0] is the latest picture, m[1] that before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sd.ddpm import predict_x0
from sd.schedules import Schedule, abar_of, sigma_of

if TYPE_CHECKING:
    from torch import Tensor

    from sd.ddpm import Denoise, Noise

FEW = (
    15  # steps of the whole schedule; under these the last ones are of lower order: long steps make a high one unstable
)


def _alpha(sigma: float) -> float:
    return abar_of(sigma) ** 0.5


def _s(sigma: float) -> float:
    return (1 - abar_of(sigma)) ** 0.5


def _log(sigma: float) -> float:
    return math.log(sigma) if sigma > 0 else -math.inf


def ancestral(sigma: float, to: float, eta: float) -> tuple[float, float]:
    """The sigma to step down to, and that of the noise which then goes up to the level that was meant."""
    up = min(to, eta * to * max(0.0, 1 - (to / sigma) ** 2) ** 0.5)
    return (to**2 - up**2) ** 0.5, up


def noised(x: Tensor, sigma: float, to: float, up: float, noise: Noise) -> Tensor:
    """Scaled latents at sigma, with noise of `up` beside the picture, scaled for level `to`."""
    x = x if sigma == to else _alpha(to) / _alpha(sigma) * x
    return x + _alpha(to) * up * noise() if up > 0 else x


# ---- DPM-Solver++ (Lu et al. 2022)


def dpmpp_2m(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise, solver_order: int = 2) -> Iterator[Tensor]:
    """The multistep solver, algorithm 2 of the paper and, for order 3, its appendix. The last step is of order 1."""
    m: list[Tensor] = []
    for i, t in enumerate(schedule.timesteps):
        sigma, to = schedule.sigmas[i : i + 2]
        m = [predict_x0(x, denoise(x, t), schedule.abars[i]), *m[:2]]
        order = _order(i, schedule, solver_order)
        x = _s(to) / _s(sigma) * x + _alpha(to) * _integral(schedule, i, m, order)
        yield x


def _order(i: int, schedule: Schedule, most: int) -> int:
    """Of step i: at first as many as there are pictures, at the end as many as steps are left, if they are long."""
    left = len(schedule) - i
    return 1 if left == 1 else min(most, i + 1, left if _few(schedule) else most)


def _few(schedule: Schedule) -> bool:
    """A picture to start from leaves out the first steps, by which those that are left grow no longer."""
    return (schedule.full or len(schedule)) < FEW


def _integral(schedule: Schedule, i: int, m: list[Tensor], order: int) -> Tensor:
    """Over step i of the picture, carried on through the last `order` of them, times e^lambda, less its decay."""
    sigma, to = schedule.sigmas[i : i + 2]
    h = _log(sigma) - _log(to)
    if order == 1:
        return -math.expm1(-h) * m[0]
    back = _log(schedule.sigmas[i - 1]) - _log(sigma)
    slope = (m[0] - m[1]) * (h / back)
    if order == 2:
        return -math.expm1(-h) * (m[0] + slope / 2)
    further = _log(schedule.sigmas[i - 2]) - _log(schedule.sigmas[i - 1])
    slope_before = (m[1] - m[2]) * (h / further)
    share = back / (back + further)
    first = slope + share * (slope - slope_before)
    second = h / (back + further) * (slope - slope_before)
    phi2 = math.expm1(-h) / h + 1
    return -math.expm1(-h) * m[0] + phi2 * first - (phi2 / h - 0.5) * second


def dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Tensor]:
    """The multistep solver of the SDE, second order by the midpoint. eta 0 is dpmpp_2m."""
    m: list[Tensor] = []
    for i, t in enumerate(schedule.timesteps):
        sigma, to = schedule.sigmas[i : i + 2]
        m = [predict_x0(x, denoise(x, t), schedule.abars[i]), *m[:1]]
        if to == 0:
            x = m[0]
        else:
            h = math.log(sigma / to)
            picture = m[0]
            if len(m) > 1:
                picture = m[0] + (m[0] - m[1]) * (h / math.log(schedule.sigmas[i - 1] / sigma) / 2)
            kept = _s(to) / _s(sigma) * math.exp(-eta * h)
            x = kept * x - _alpha(to) * math.expm1(-h - eta * h) * picture
            x = _with_noise(x, to, h, eta, s_noise, noise)
        yield x


def _with_noise(x: Tensor, to: float, h: float, eta: float, s_noise: float, noise: Noise) -> Tensor:
    up = _s(to) * (-math.expm1(-2 * eta * h)) ** 0.5 * s_noise
    return x + up * noise() if up > 0 else x


def dpmpp_3m_sde(
    denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Tensor]:
    """The third order of it, as k-diffusion has it: through the last three pictures."""
    m: list[Tensor] = []
    for i, t in enumerate(schedule.timesteps):
        sigma, to = schedule.sigmas[i : i + 2]
        m = [predict_x0(x, denoise(x, t), schedule.abars[i]), *m[:2]]
        if to == 0:
            x = m[0]
        else:
            h = math.log(sigma / to)
            decay = h * (eta + 1)
            picture = -math.expm1(-decay) * m[0] + _curved(schedule.sigmas[: i + 1], m, h, decay)
            x = _s(to) / _s(sigma) * math.exp(-eta * h) * x + _alpha(to) * picture
            x = _with_noise(x, to, h, eta, s_noise, noise)
        yield x


def _curved(sigmas: tuple[float, ...], m: list[Tensor], h: float, decay: float) -> Tensor | float:
    """What the pictures before add to a step of h that decays by e^-decay."""
    if len(m) == 1:
        return 0.0
    phi2 = math.expm1(-decay) / decay + 1
    r0 = math.log(sigmas[-2] / sigmas[-1]) / h
    slope = (m[0] - m[1]) / r0
    if len(m) == 2:
        return phi2 * slope
    r1 = math.log(sigmas[-3] / sigmas[-2]) / h
    bend = (slope - (m[1] - m[2]) / r1) / (r0 + r1)
    return phi2 * (slope + bend * r0) - (phi2 / decay - 0.5) * bend


def dpmpp_sde(
    denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Tensor]:
    """The single-step solver of the SDE: a second call in the middle of lambda, whose picture stands for the step's.

    Its two draws are of one Brownian path, as k-diffusion's: the whole step's noise holds that of its first half.
    """
    for i, t in enumerate(schedule.timesteps):
        sigma, to = schedule.sigmas[i : i + 2]
        picture = predict_x0(x, denoise(x, t), schedule.abars[i])
        if to == 0:
            x = picture
        else:
            middle = (sigma * to) ** 0.5
            first, second = (noise(), noise()) if eta * s_noise > 0 else (0.0, 0.0)
            ahead = _sde_step(x, picture, sigma, middle, eta, s_noise * first)
            eps = denoise(ahead, schedule.timestep_at(middle))
            picture = predict_x0(ahead, eps, abar_of(middle))
            whole = ((sigma - middle) ** 0.5 * first + (middle - to) ** 0.5 * second) / (sigma - to) ** 0.5
            x = _sde_step(x, picture, sigma, to, eta, s_noise * whole)
        yield x


def _sde_step(x: Tensor, picture: Tensor, sigma: float, to: float, eta: float, noise: Tensor | float) -> Tensor:
    """To the level, with the picture held, and with noise of variance 1."""
    down, up = ancestral(sigma, to, eta)
    share = down / sigma
    return _alpha(to) * (share / _alpha(sigma) * x + (1 - share) * picture + up * noise)


# ---- UniPC (Zhao et al. 2023)


def unipc(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise, solver_order: int = 2) -> Iterator[Tensor]:
    """Predictor and corrector of one form, B(h) = e^h - 1: a step's end is corrected by the call that is made there.

    The correction is added to the latents as they are then, so that what the caller wrote to them is kept.
    """
    m: list[Tensor] = []
    bend, order = 0.0, 1
    for i, t in enumerate(schedule.timesteps):
        picture = predict_x0(x, denoise(x, t), schedule.abars[i])
        sigma, to = schedule.sigmas[i : i + 2]
        if i > 0:
            x = x + (_unipc_bend(schedule, i - 1, m, order, picture) - bend)
        m = [picture, *m[: solver_order - 1]]
        order = min(solver_order, i + 1, len(schedule) - i)
        bend = _unipc_bend(schedule, i, m, order, None)
        x = _s(to) / _s(sigma) * x - _alpha(to) * math.expm1(_log(to) - _log(sigma)) * m[0] + bend
        yield x


def _unipc_bend(schedule: Schedule, i: int, m: list[Tensor], order: int, corrected: Tensor | None) -> Tensor | float:
    """What step i adds beside the latest picture by the last `order` pictures; with that of its end: the corrector."""
    sigma, to = schedule.sigmas[i : i + 2]
    if order == 1 and corrected is None:
        return 0.0
    h = math.log(sigma / to)
    ratios = [math.log(sigma / schedule.sigmas[i - j]) / h for j in range(1, order)]
    slopes = [(m[j] - m[0]) / ratio for j, ratio in enumerate(ratios, start=1)]
    if corrected is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, corrected - m[0]]
    shares = _unipc_shares(ratios, h, corrected is not None)
    bend = sum(share * slope for share, slope in zip(shares, slopes, strict=True))
    return -_alpha(to) * math.expm1(-h) * bend


def _unipc_shares(ratios: list[float], h: float, corrects: bool) -> list[float]:
    """Of the slopes, so that as many orders as there are vanish; of one slope 1/2, as the paper has it."""
    count = len(ratios)
    if count <= 1:
        return [0.5] * count
    phi, factorial, right = math.expm1(-h) / -h - 1, 1, []
    for k in range(1, count + 1):
        right.append(phi * factorial / math.expm1(-h))
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    return _solved([[ratio**k for ratio in ratios] for k in range(count)], right)


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Cramer's rule, for two or three unknowns."""
    whole = _determinant(matrix)
    columns = range(len(right))
    with_right = lambda c: [[right[r] if k == c else row[k] for k in columns] for r, row in enumerate(matrix)]  # noqa: E731
    return [_determinant(with_right(c)) / whole for c in columns]


def _determinant(matrix: list[list[float]]) -> float:
    if len(matrix) == 1:
        return matrix[0][0]
    minors = ([row[:c] + row[c + 1 :] for row in matrix[1:]] for c in range(len(matrix)))
    return sum((-1) ** c * matrix[0][c] * _determinant(minor) for c, minor in enumerate(minors))


# ---- DEIS (Zhang and Chen 2022)


def deis(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise, solver_order: int = 2) -> Iterator[Tensor]:
    """The polynomial in log sigma through the last predictions of noise, integrated over sigma. Ends as ddim does."""
    sigmas = (*schedule.sigmas[:-1], sigma_of(schedule.table[0]))
    eps: list[Tensor] = []
    for i, t in enumerate(schedule.timesteps):
        eps = [denoise(x, t), *eps[: solver_order - 1]]
        left = len(schedule) - i if _few(schedule) else solver_order
        order = min(len(eps), left)
        nodes = [math.log(sigmas[i - j]) for j in range(order)]
        slope = sum(_log_integral(nodes, j, *sigmas[i : i + 2]) * eps[j] for j in range(order))
        x = _alpha(sigmas[i + 1]) * (x / _alpha(sigmas[i]) + slope)
        yield x


def _log_integral(nodes: list[float], j: int, sigma: float, to: float) -> float:
    """Over sigma, from sigma to `to`, of the polynomial in log sigma that is 1 at nodes[j] and 0 at the others."""
    others = [node for k, node in enumerate(nodes) if k != j]
    scale = math.prod(nodes[j] - node for node in others)

    def antiderivative(at: float) -> float:
        log = math.log(at)
        if not others:
            return at
        if len(others) == 1:
            return at * (log - 1 - others[0])
        return at * (log**2 - (2 + others[0] + others[1]) * (log - 1) + others[0] * others[1])

    return (antiderivative(to) - antiderivative(sigma)) / scale


# ---- for models distilled to a few steps


def lcm(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise) -> Iterator[Tensor]:
    """Latent consistency (Luo et al. 2023): the picture at each level, noised anew to the next."""
    for i, t in enumerate(schedule.timesteps):
        eps = denoise(x, t)
        scaled = 10 * t  # the boundary's scale of time; sigma of the data is 1/2
        own, predicted = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        x = own * x + predicted * predict_x0(x, eps, schedule.abars[i])
        if i + 1 < len(schedule):
            abar = schedule.abars[i + 1]
            x = abar**0.5 * x + (1 - abar) ** 0.5 * noise()
        yield x


def tcd(denoise: Denoise, x: Tensor, schedule: Schedule, noise: Noise, eta: float = 0.3) -> Iterator[Tensor]:
    """Trajectory consistency (Zheng et al. 2024): below the next level by the share eta, and up to it by noise."""
    for i, t in enumerate(schedule.timesteps):
        to = schedule.timesteps[i + 1] if i + 1 < len(schedule) else 0
        below = schedule.table[int((1 - eta) * to + 1e-6)]  # 0.7 * 90 is 62.99999999999999
        eps = denoise(x, t)
        x = below**0.5 * predict_x0(x, eps, schedule.abars[i]) + (1 - below) ** 0.5 * eps
        if i + 1 < len(schedule) and eta > 0:
            share = schedule.abars[i + 1] / below
            x = share**0.5 * x + (1 - share) ** 0.5 * noise()
        yield x

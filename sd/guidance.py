"""Denoisers, which a sampler calls: classifier-free guidance over a network that takes text, and what networks predict.

Nothing here knows a model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Predict = Callable[..., Tensor]
"""A network: predict(x [B, C, H, W], t [], context [B, S, C], *residuals) -> the noise in x."""


@dataclass(frozen=True)
class Residuals:
    """Another network, whose answers are added inside the first: a ControlNet (sd/controlnet.py).

    network(x, t, context, hint) -> tensors of batch B. hint: what it is told beside, [1 or b, C, H, W] for b pictures,
    which both halves of a batch hold. weight: its answers are multiplied by it. start, end: it answers in the steps
    that lie wholly between these fractions of them.
    """

    network: Callable[..., Sequence[Tensor]]
    hint: Tensor
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def hold(self, call: "Call") -> bool:
        return call.step / call.steps >= self.start and (call.step + 1) / call.steps <= self.end

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> list[Tensor]:
        hint = self.hint.repeat(len(x) // len(self.hint), 1, 1, 1)
        answers = self.network(x, t, context, hint)
        return answers if self.weight == 1 else [self.weight * answer for answer in answers]


@dataclass(frozen=True)
class Conditions:
    """What the network is told beside latents and timestep.

    context: [2B, S, C], the unconditional half first, then the conditional one; at scale 1 it is only that, [B, S, C].
    scale: of the guidance. by_step: the context of each step, where it changes; where it stays, the same object.
    beside: channels that the network takes after those of the latents, [1 or B, c, H, W]. residuals: of other networks.
    """

    context: Tensor
    scale: float
    by_step: tuple[Tensor, ...] = ()
    beside: Tensor | None = None
    residuals: tuple[Residuals, ...] = ()

    def context_at(self, step: int) -> Tensor:
        return self.by_step[min(step, len(self.by_step) - 1)] if self.by_step else self.context


@dataclass
class Call:
    """Where in a picture the network is called: the one record of it, kept on the host.

    step counts from 0 to steps - 1, timestep is the schedule's there. guided: the picture is drawn with guidance.
    halves_alike: the call's batch is two halves that hold the same latents. anew: nothing may serve in it that an
    earlier step has left, as where the batch is another than at that step. predicted: the clean latents that the
    network's latest answer comes to, [B, C, H, W]. Between pictures it is as it is made.
    """

    step: int = 0
    steps: int = 1
    timestep: int | None = None
    guided: bool = False
    halves_alike: bool = False
    anew: bool = False
    predicted: Callable[[], Tensor] | None = None

    @contextmanager
    def sampling(self, timesteps: Sequence[int], guided: bool) -> Iterator[Callable[[int], None]]:
        """Within this a picture is drawn; yields start(step), to be called before each step."""
        self.steps, self.guided = len(timesteps), guided

        def start(step: int) -> None:
            self.step, self.timestep = step, timesteps[step] if step < len(timesteps) else None

        start(0)
        try:
            yield start
        finally:
            self.__init__()

    @contextmanager
    def halves(self, alike: bool, anew: bool = False) -> Iterator[None]:
        """Within this the network's batch is, or is not, two halves alike; and nothing is used again, if anew."""
        before = self.halves_alike, self.anew
        self.halves_alike, self.anew = alike, anew
        try:
            yield
        finally:
            self.halves_alike, self.anew = before


class Guided:
    """A denoiser with classifier-free guidance (Ho and Salimans 2022): uncond + scale * (cond - uncond).

    `predict(x, t, context)` is the network; both halves of the context go through it in one call. It runs in the
    context's dtype, the guidance in x's. `call` says which step it is, and is told that the halves are alike.
    """

    def __init__(self, predict: Predict, conditions: Conditions, call: Call | None = None):
        self.predict = predict
        self.conditions = conditions
        self.call = call or Call()
        self.latest: tuple[Tensor, Tensor, float] | None = None

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Latents x [B, C, H, W] at timestep t -> the noise in them, [B, C, H, W] in x's dtype; both are `latest`."""
        eps = self._eps(x, t)
        self.latest = x, eps, t
        return eps

    def _eps(self, x: Tensor, t: float) -> Tensor:
        t = torch.full((), t, device=x.device)  # filled there: a copy would make the host wait
        scale, context = self.conditions.scale, self.conditions.context_at(self.call.step)
        given = self._with_beside(x).to(context.dtype)
        if scale == 1:
            return self.predict(given, t, context, *self._residuals(given, t, context)).to(x.dtype)
        both = torch.cat([given, given])
        with self.call.halves(alike=True):
            residuals = self._residuals(both, t, context)
            uncond, cond = self.predict(both, t, context, *residuals).to(x.dtype).chunk(2)
        return uncond + scale * (cond - uncond)

    def _residuals(self, x: Tensor, t: Tensor, context: Tensor) -> list[Tensor]:
        """Of all networks that answer at this step, added up."""
        found = [one(x, t, context) for one in self.conditions.residuals if one.hold(self.call)]
        return [sum(rest, start=first) for first, *rest in zip(*found, strict=True)]

    def _with_beside(self, x: Tensor) -> Tensor:
        beside = self.conditions.beside
        return x if beside is None else torch.cat([x, beside.expand(len(x), -1, -1, -1).to(x)], dim=1)


def from_velocity(denoise: Denoise, abar_at: Callable[[float], float]) -> Denoise:
    """A denoiser of a network that predicts v = alpha * eps - s * x0 (Salimans and Ho 2022): its eps.

    abar_at(t) is the share of the picture's variance at a timestep: `Schedule.abar_at`.
    """

    def eps(x: Tensor, t: float) -> Tensor:
        abar = abar_at(t)
        return abar**0.5 * denoise(x, t) + (1 - abar) ** 0.5 * x

    return eps


def from_picture(denoise: Denoise, abar_at: Callable[[float], float]) -> Denoise:
    """A denoiser of a network that predicts the clean latents x0: its eps."""

    def eps(x: Tensor, t: float) -> Tensor:
        abar = abar_at(t)
        return (x - abar**0.5 * denoise(x, t)) / (1 - abar) ** 0.5

    return eps

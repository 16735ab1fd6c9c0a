"""Classifier-free guidance in a part of the steps only (Kynkaanniemi et al. 2024)."""

from collections.abc import Callable

import torch
from torch import Tensor

from sd.guidance import Call
from sd.optimizations.base import ConditionalHalf, Patch, Stage, each, optimization


class GuidanceInterval:
    """Outside of the interval the conditional half alone runs, and stands for both.

    uncond + scale * (cond - uncond) is cond then, up to rounding, so the sampler needs not know.
    """

    def __init__(self, call: Call, low: float, high: float):
        self.call, self.low, self.high = call, low, high
        self.half = ConditionalHalf()

    def inside(self, call: Call) -> bool:
        """Whether a call has both halves, or is one of a picture without guidance."""
        return not call.guided or self._holds(call.step)

    def _holds(self, step: int) -> bool:
        return self.low <= step / self.call.steps < self.high

    def _begins_or_ends(self) -> bool:
        """Whether the batch is another than at the step before."""
        return self.call.guided and self.call.step > 0 and self._holds(self.call.step - 1) != self.inside(self.call)

    def around(self, predict: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(x: Tensor, t: Tensor, context: Tensor, *residuals: Tensor) -> Tensor:
            anew = self._begins_or_ends()
            if self.inside(self.call):
                with self.call.halves(self.call.halves_alike, anew):
                    return predict(x, t, context, *residuals)
            with self.call.halves(alike=False, anew=anew):
                eps = predict(x.chunk(2)[1], t, self.half(context), *(r.chunk(2)[1] for r in residuals))
            return each(lambda one: torch.cat([one, one]), eps)

        return forward


def _fractions(text: str) -> tuple[float, float]:
    low, _, high = text.partition("-")
    try:
        interval = float(low), float(high)
    except ValueError:
        interval = 1.0, 0.0
    if not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError("two fractions of the steps, as 0.0-0.6")
    return interval


@optimization(
    "guidance-interval",
    stage=Stage.GUIDANCE,
    exact=False,
    summary="guidance in a part of the steps only",
    value=_fractions,
    hint="LOW-HIGH",
)
def guidance_interval(patch: Patch, interval: tuple[float, float] = (0.0, 0.6)) -> None:
    """Classifier-free guidance only in a part of the steps, given as fractions; elsewhere half the work. Approximate.

    Helps: late steps, where guidance changes little. Hurts: early ones, where it decides what is drawn; at batch 1 a
    large GPU is not twice as fast on half the work.
    """
    guidance = GuidanceInterval(patch.call, *interval)
    patch.also_predicts(guidance.half)
    patch.around("predict", guidance.around)
    patch.key(guidance.inside)

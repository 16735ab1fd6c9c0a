"""Cross-attention's output kept from a step on (Zhang et al. 2024, "Cross-Attention Makes Inference Cumbersome in
Text-to-Image Diffusion Models").

Axes: B batch, C channels, L = H*W positions.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from sd.guidance import Call
from sd.optimizations.base import ConditionalHalf, Patch, Stage, at_least, each, keep, optimization
from sd.unet import BasicTransformerBlock

OPEN, KEEPING, CLOSED = "open", "keeping", "closed"


class Gate:
    """Open, cross-attention runs. In the last step before `step` its output is kept, and from then on it is closed:
    what was kept, the mean of the unconditional and the conditional half, stands for it, and guidance is off.

    So one half of the batch is left, which no longer sees the text; its result stands for both halves, and
    uncond + scale * (cond - uncond) is that result. Without guidance there is no mean, and the batch stays.
    """

    def __init__(self, call: Call, step: int):
        self.call, self.step = call, step
        self.half = ConditionalHalf()
        self.phase = OPEN  # kept here, and not asked of the call in each module: compiled ones are made for each value

    def phase_of(self, call: Call) -> str:
        if call.steps <= self.step or call.step < self.step - 1:
            return OPEN
        return KEEPING if call.step == self.step - 1 else CLOSED

    def around_predict(self, predict: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(x: Tensor, t: Tensor, context: Tensor, *residuals: Tensor) -> Tensor:
            self.phase = self.phase_of(self.call)
            # Every cross-attention must run where outputs are kept; and then the batch is another.
            anew = self.phase != OPEN and self.call.step <= self.step
            if self.phase != CLOSED or not self.call.guided:
                with self.call.halves(self.call.halves_alike, anew):
                    return predict(x, t, context, *residuals)
            with self.call.halves(alike=False, anew=anew):
                eps = predict(x.chunk(2)[1], t, self.half(context), *(r.chunk(2)[1] for r in residuals))
            return each(lambda one: torch.cat([one, one]), eps)

        return forward

    def around_attention(self, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        kept: dict[Hashable, Tensor] = {}  # by its shape

        def forward(x: Tensor, context: Tensor) -> Tensor:
            """x [B, L, C] -> [B, L, C]."""
            if self.phase == CLOSED:
                return kept[tuple(x.shape)]
            y = attend(x, context)
            if self.phase == KEEPING:
                one = mean_of_halves(y) if self.call.halves_alike else y
                keep(kept, tuple(one.shape), one)
            return y

        return forward


def mean_of_halves(y: Tensor) -> Tensor:
    unconditional, conditional = y.chunk(2)
    return (unconditional + conditional) / 2


def half_of_controls(patch: Patch, step: int = 10) -> None:
    """Of a ControlNet, the half that is used. It attends to the text in every step: it may begin to act after the one
    that keeps."""
    gate = Gate(patch.call, step)
    patch.also_predicts(gate.half)
    patch.around("predict", gate.around_predict)
    patch.key(gate.phase_of)


@optimization(
    "tgate",
    stage=Stage.GUIDANCE,
    exact=False,
    summary="cross-attention kept, and guidance off, from a step on",
    value=at_least(1),
    hint="STEP",
    conflicts=("guidance-interval",),
    beside=half_of_controls,
)
def tgate(patch: Patch, step: int = 10) -> None:
    """From a step on, counted from 0, each cross-attention gives what it gave at the step before, the mean of both
    halves of guidance; and guidance is off, as in the paper (Zhang et al. 2024). Approximate.

    Half the batch and no cross-attention is left of the later steps. A picture of no more steps than that is not
    changed at all; with an init image, the steps that are run count. Beside deepcache, the deep levels run at the
    step that keeps and at the next. guidance-interval says where guidance is on too, so that both cannot be.

    Helps: pictures of many steps, the late ones of which change little. Hurts: few steps, and details that the text
    asks for; at batch 1 a large GPU is not twice as fast on half the work. What is kept takes 23 MB a picture in fp16
    at 512x512. The paper's second version, which uses self-attention again too, is not in here.
    """
    gate = Gate(patch.call, step)
    for block in patch.unet.modules():
        if isinstance(block, BasicTransformerBlock):
            patch.around(block.attn2, gate.around_attention)
            own = getattr(block.attn2, "kernel", "")
            patch.set(block.attn2, "kernel", f"{own}, its output kept from step {step} on".removeprefix(", "))
    patch.around("predict", gate.around_predict)
    patch.key(lambda call: (gate.phase_of(call), call.halves_alike))

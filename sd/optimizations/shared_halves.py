"""What both halves of guidance have in common, computed once.

Both see the same latents, and differ only from the first cross-attention on. Up to there each module runs on the first
half of the batch, and its result stands for both.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from sd.guidance import Call
from sd.optimizations.base import Patch, Stage, optimization
from sd.unet import SpatialTransformer


def on_one_half(forward: Callable[..., Tensor], call: Call) -> Callable[..., Tensor]:
    """A module's forward, on the first half of the batch where both halves are alike.

    All its inputs must have the batch as their first axis, or one row for all of it.
    """

    def shared(*inputs: Tensor) -> Tensor:
        if not call.halves_alike:
            return forward(*inputs)
        y = forward(*(x[: max(1, x.shape[0] // 2)] for x in inputs))
        return torch.cat([y, y])

    return shared


def before_the_text(unet: nn.Module) -> Iterator[nn.Module]:
    """The layers before the first transformer, and its first self-attention."""
    for layer in (layer for block in unet.input_blocks for layer in block):
        if isinstance(layer, SpatialTransformer):
            yield layer.transformer_blocks[0].attn1
            return
        yield layer


@optimization("shared-halves", stage=Stage.CALLS, exact=True, summary="what precedes the text, once for both halves")
def shared_halves(patch: Patch) -> None:
    """Both halves of guidance see the same latents: up to the first text, one half is computed for both. Exact.

    Helps: saves the first residual block and the first, largest self-attention of one half, 2% of a step's arithmetic.
    Hurts: nothing known; without guidance it does nothing.
    """
    for module in before_the_text(patch.unet):
        patch.around(module, lambda forward: on_one_half(forward, patch.call))
    patch.key(lambda call: call.halves_alike)

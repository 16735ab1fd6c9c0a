"""A UNet whose forward is cut into stages, so that a cache can stand for one of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from sd.unet import UNet, with_residuals


class StagedUNet(UNet):
    """The plain forward, with `deep` in place of the levels, if set."""

    kernel = "deep features kept"
    deep: Callable[..., Tensor] | None = None

    def forward(self, x: Tensor, t: Tensor, context: Tensor, *residuals: Tensor) -> Tensor:
        emb = self.time_embed(t, x)
        if self.deep is not None:
            return self.out(self.deep(self, x, emb, context, *residuals))
        skips: list[Tensor] = []
        x = self.down(x, emb, context, skips, 0, len(self.input_blocks))
        x = self.middle_block(x, emb, context)
        if residuals:
            x, skips = with_residuals(x, skips, residuals)
        return self.out(self.up(x, emb, context, skips, 0, len(self.output_blocks)))

    def down(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor], start: int, stop: int) -> Tensor:
        """Input blocks start to stop - 1; their outputs are appended to skips."""
        for block in self.input_blocks[start:stop]:
            x = block(x, emb, context)
            skips.append(x)
        return x

    def up(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor], start: int, stop: int) -> Tensor:
        """Output blocks start to stop - 1; each takes the last of skips away."""
        for block in self.output_blocks[start:stop]:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
        return x

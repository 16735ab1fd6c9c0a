"""A UNet whose forward is cut into stages, so that a cache can stand for one of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from sd.unet import UNet, timestep_embedding, with_residuals


class StagedUNet(UNet):
    """The plain forward, with `time_table` in place of the timestep's embedding and `deep` of the levels, if set."""

    time_table: Callable[[Tensor], Tensor] | None = None
    deep: Callable[..., Tensor] | None = None

    @property
    def kernel(self) -> str:
        """For `explain`."""
        parts = {"timestep from a table": self.time_table, "deep features kept": self.deep}
        return ", ".join(name for name, part in parts.items() if part is not None)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, *residuals: Tensor) -> Tensor:
        emb = self._embed(t, x)
        if self.deep is not None:
            return self.out(self.deep(self, x, emb, context, *residuals))
        skips: list[Tensor] = []
        x = self.down(x, emb, context, skips, 0, len(self.input_blocks))
        x = self.middle_block(x, emb, context)
        if residuals:
            x, skips = with_residuals(x, skips, residuals)
        return self.out(self.up(x, emb, context, skips, 0, len(self.output_blocks)))

    def _embed(self, t: Tensor, x: Tensor) -> Tensor:
        if self.time_table is not None:
            return self.time_table(t)
        return self.time_embed(timestep_embedding(t.expand(x.shape[0]), self.model_channels).to(x.dtype))

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

"""What the residual blocks add at each timestep, as a table made once a model.

Axes: B batch, E all channels that residual blocks add a timestep to.
"""

import torch
from torch import Tensor, nn

from sd.checkpoints.stamps import Stamp
from sd.optimizations.base import Patch, Stage, optimization
from sd.schedules import TRAIN_STEPS
from sd.unet import ResBlock, TimeEmbed, timestep_embedding


class TimeSlice(nn.Sequential):
    """A residual block's `emb_layers` that takes its part of a row that holds the results for all blocks."""

    kernel = "a row of the time table"
    start: int
    stop: int

    def forward(self, emb: Tensor) -> Tensor:
        return emb[:, self.start : self.stop]


class TableTimeEmbed(TimeEmbed):
    """Rows of the table for all residual blocks, in place of what they would compute them from."""

    kernel = "timestep from a table"
    table: "TimeTable"

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.table(t)


class TimeTable:
    """What every residual block adds at every timestep: 1000 rows of E numbers, 40 MB for SD 1.5 in fp16."""

    def __init__(self, time_embed: TimeEmbed, blocks: list[nn.Sequential]):
        self.time_embed = time_embed
        self.blocks = blocks
        self.rows: Tensor | None = None
        self.stamp: Stamp | None = None

    def __call__(self, t: Tensor) -> Tensor:
        """Timesteps t [] or [B] -> [1 or B, E]. Those between the integers are computed."""
        if t.is_floating_point():
            return self._compute(t.reshape(-1))
        return self.rows.index_select(0, t.reshape(-1))  # not rows[t], which makes the host wait for t's value

    def refresh(self, context: Tensor) -> None:
        current = Stamp(p for part in (self.time_embed, *self.blocks) for p in part.parameters())
        if current == self.stamp:
            return
        rows = self._compute(torch.arange(TRAIN_STEPS, device=self.time_embed[0].weight.device))
        self.rows = rows if self.rows is None else self.rows.copy_(rows)
        self.stamp = current

    def _compute(self, t: Tensor) -> Tensor:
        sinusoids = timestep_embedding(t, self.time_embed.channels).to(self.time_embed[0].weight.dtype)
        emb = nn.Sequential.forward(self.time_embed, sinusoids)
        return torch.cat([nn.Sequential.forward(block, emb) for block in self.blocks], dim=1)


@optimization("time-cache", stage=Stage.REUSE, exact=True, summary="timestep embeddings from a table")
def time_cache(patch: Patch) -> None:
    """What each residual block adds at each of the 1000 timesteps, once a model, as a table. Exact.

    Helps: some 60 small kernels a step. Hurts: a single picture on a CPU, where the table costs half a second; 40 MB.
    """
    time_embed = patch.unet.time_embed
    table = TimeTable(time_embed, [m.emb_layers for m in patch.unet.modules() if isinstance(m, ResBlock)])
    patch.swap(time_embed, TableTimeEmbed, table=table)
    patch.seldom("once a model", time_embed[0], time_embed[2])
    start = 0
    for layers in table.blocks:
        stop = start + layers[1].out_features
        patch.swap(layers, TimeSlice, start=start, stop=stop)
        patch.seldom("once a model", layers[1])
        start = stop
    patch.before_predict(table.refresh)

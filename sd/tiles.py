"""A map computed in tiles that overlap, so that memory grows with the tile and not with the picture.

Axes: B batch, C channels, H W of what is given, and of what comes out, which may be larger or smaller.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin so that they cover `length`, each overlapping the next by at least `overlap`."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def ramp(length: int, before: bool, after: bool, width: int, device: torch.device) -> Tensor:
    """Weights [length]: 1, but rising over `width` where a tile lies before, and falling where one lies after."""
    rising = (torch.arange(length, device=device) + 0.5).div(width).clamp(max=1)
    weight = torch.ones(length, device=device)
    if before:
        weight = weight * rising
    return weight * rising.flip(0) if after else weight


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, step: int = 1) -> Tensor:
    """function(x [B, C, H, W]), tile by tile; where tiles overlap, a weighted mean of both.

    tile and overlap count pixels of x, and so does step, of which tiles begin at a multiple: where the function makes
    maps smaller. What is no larger than a tile is computed whole.
    """
    height, width = x.shape[-2:]
    if max(height, width) <= tile:
        return function(x)
    total = weights = None
    rows, columns = ([s * step for s in tile_starts(n // step, tile // step, overlap // step)] for n in (height, width))
    for top in rows:
        for left in columns:
            part = function(x[..., top : top + tile, left : left + tile].contiguous())
            place = [_scaled(n, part.shape[-2], min(tile, height)) for n in (top, left, height, width, overlap)]
            y, z, whole_height, whole_width, over = place
            if total is None:
                total = part.new_zeros(*part.shape[:2], whole_height, whole_width, dtype=torch.float32)
                weights = torch.zeros(whole_height, whole_width, device=part.device)
            down = ramp(part.shape[-2], top > 0, top < rows[-1], over, part.device)
            across = ramp(part.shape[-1], left > 0, left < columns[-1], over, part.device)
            weight = down[:, None] * across
            window = (..., slice(y, y + part.shape[-2]), slice(z, z + part.shape[-1]))
            total[window] += part * weight
            weights[window] += weight
    return (total / weights).to(part.dtype)


def _scaled(length: int, out: int, given: int) -> int:
    """A length of what is given, in pixels of what comes out."""
    return length * out // given

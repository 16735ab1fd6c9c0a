"""Decoding large pictures in tiles that overlap, so that memory grows with the tile and not with the picture.

Axes: B batch, h w latent rows and columns, H W picture rows and columns, 8 to a latent in SD 1.5.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sd.optimizations.base import Patch, Stage, at_least, optimization

Decode = Callable[[Tensor], Tensor]


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


def decode_in_tiles(decode: Decode, latents: Tensor, tile: int, overlap: int) -> Tensor:
    """decode(latents [B, z, h, w]) -> [B, 3, H, W], tile by tile; where tiles overlap, a weighted mean of both.

    tile and overlap count latents. Latents no larger than a tile are decoded whole.
    """
    height, width = latents.shape[-2:]
    if max(height, width) <= tile:
        return decode(latents)
    total = weights = None
    rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    for y in rows:
        for x in columns:
            part = decode(latents[..., y : y + tile, x : x + tile].contiguous())
            scale = part.shape[-2] // min(tile, height)
            if total is None:
                total = part.new_zeros(*part.shape[:2], height * scale, width * scale, dtype=torch.float32)
                weights = torch.zeros(height * scale, width * scale, device=part.device)
            down = ramp(part.shape[-2], y > 0, y < rows[-1], overlap * scale, part.device)
            across = ramp(part.shape[-1], x > 0, x < columns[-1], overlap * scale, part.device)
            weight = down[:, None] * across
            window = (..., slice(y * scale, y * scale + part.shape[-2]), slice(x * scale, x * scale + part.shape[-1]))
            total[window] += part * weight
            weights[window] += weight
    return (total / weights).to(part.dtype)


@optimization(
    "vae-tiling",
    stage=Stage.MEMORY,
    exact=False,
    summary="large pictures decoded in tiles",
    value=at_least(16),
    hint="LATENTS",
)
def vae_tiling(patch: Patch, tile: int = 64) -> None:
    """Pictures larger than a tile are decoded in tiles that overlap by a quarter. Approximate: norms see a tile each.

    Helps: memory, which grows with the picture otherwise. Hurts: time, by the overlap.
    """
    patch.around("decode", lambda decode: lambda latents: decode_in_tiles(decode, latents, tile, tile // 4))

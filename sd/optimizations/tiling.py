"""Decoding large pictures in tiles that overlap, so that memory grows with the tile and not with the picture."""

from sd.optimizations.base import Patch, Stage, at_least, optimization
from sd.tiles import in_tiles


@optimization(
    "vae-tiling",
    stage=Stage.MEMORY,
    exact=False,
    summary="large pictures decoded in tiles",
    value=at_least(16),
    hint="LATENTS",
)
def vae_tiling(patch: Patch, tile: int = 64) -> None:
    """What is larger than a tile of latents is decoded in tiles that overlap by a quarter. Approximate: each has its
    own norms.

    Helps: memory, which grows with the picture otherwise. Hurts: time, by the overlap.
    """
    patch.around("decode", lambda decode: lambda latents: in_tiles(decode, latents, tile, tile // 4))

"""Decoding in tiles that overlap."""

import itertools

import pytest
import torch
from torch import nn

from bench.reference.numbers import noise, relative_error
from bench.reference.weights import TINY
from sd import tiles


@pytest.mark.parametrize("length", [5, 16, 17, 31, 64, 100])
def test_tiles_cover_and_overlap(length):
    starts = tiles.tile_starts(length, 16, 4)
    assert starts[0] == 0
    assert starts[-1] + 16 >= length
    assert all(0 < b - a <= 12 for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (40, 16), (16, 40), (33, 50)])
def test_tiles_of_a_local_decoder_join_without_a_trace(height, width):
    decode = lambda x: nn.functional.interpolate(x[:, :3], scale_factor=8.0, mode="nearest")  # noqa: E731
    latents = noise(2, 4, height, width)
    assert relative_error(tiles.in_tiles(decode, latents, 16, 4), decode(latents)) < 1e-6


@torch.inference_mode()
def test_vae_tiling_on_the_model(make):
    tiled, plain = make("vae-tiling=16", config=TINY), make(config=TINY)
    small, large = noise(1, 4, 16, 16), noise(1, 4, 24, 40)
    assert torch.equal(tiled.vae.decode(small), plain.vae.decode(small))
    whole, joined = plain.vae.decode(large), tiled.vae.decode(large)
    # Random weights' norms differ from tile to tile, so that this is a loose bound; a tile out of place is over 1.
    assert relative_error(joined, whole) < 0.3
    corner = plain.vae.decode(large[..., :16, :16])[..., :64, :64]  # the first tile alone reaches there
    assert relative_error(joined[..., :64, :64], corner) < 1e-6

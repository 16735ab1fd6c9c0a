"""Weights back to their file, and freed memory kept."""

import numpy as np
import pytest
import torch

from bench.reference.numbers import noise, pixels
from sd.optimizations import OptimizationError
from sd.optimizations import memory as switches
from tests.optimizations.support import DRAW


def test_keep_memory_draws_the_same(make):
    a, b = (pixels(make(*names).generate("a cat", **DRAW)) for names in (["keep-memory"], []))
    assert np.array_equal(a, b)


def test_page_out_lets_go_of_what_the_next_stage_does_not_need(loaded, monkeypatch):
    """Text encoder and VAE before the steps, the UNet before decoding; and the picture is the same."""
    let_go = []
    page_out = switches.page_out_tensor
    monkeypatch.setattr(switches, "page_out_tensor", lambda tensor: (let_go.append(id(tensor)), page_out(tensor)))
    pipe, plain = loaded("page-out"), loaded()
    before_steps: list[int] = []
    picture = pipe.generate("a cat", **DRAW, on_step=lambda i, n, x: before_steps.extend(let_go if i == 1 else ()))
    assert set(before_steps) <= {id(p) for model in (pipe.clip, pipe.vae) for p in model.parameters()}
    assert set(let_go) - set(before_steps) <= {id(p) for p in pipe.unet.parameters()}
    assert before_steps
    assert len(let_go) > len(before_steps)
    assert np.array_equal(pixels(picture), pixels(plain.generate("a cat", **DRAW)))


def test_page_out_says_when_there_is_no_file_behind_the_weights(make):
    with pytest.raises(
        OptimizationError, match="page-out needs a CPU, and weights that are mapped from a file; these are not"
    ):
        make("page-out")


def test_page_out_takes_arguments_by_name(loaded):
    pipe, plain = loaded("page-out"), loaded()
    context, latents = (
        pipe.encode_prompts(prompts=["a cat"], negatives=None),
        noise(1, pipe.config.vae.z_channels, 2, 2),
    )
    assert torch.equal(context, plain.encode_prompts(["a cat"], None))
    assert torch.equal(pipe.vae.decode(latents=latents), plain.vae.decode(latents))

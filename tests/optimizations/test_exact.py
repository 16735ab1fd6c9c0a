"""Exact optimizations change nothing: alone, in pairs, all at once, and when somebody writes to the weights."""

import itertools

import numpy as np
import pytest
import torch

from bench.reference import weights
from bench.reference.numbers import noise, pixels, relative_error
from bench.reference.weights import TINY
from sd.optimizations import OptimizationError, catalog
from sd.optimizations.staged_unet import StagedUNet
from sd.pipeline import StableDiffusion
from tests.optimizations.support import CHANGES, EXACT_ON_CPU, assert_same, inputs
from tests.sparing import sparing

ALL = tuple(name for name in EXACT_ON_CPU if name not in ("naive", "attention", "pointwise-linear"))
"""Of those that exclude each other, the C++ kernels' one."""


@torch.inference_mode()
def test_none_is_the_plain_pipeline_to_the_bit(make):
    pipe, models = make(config=TINY), weights.random_models(TINY)
    assert_same(pipe, StableDiffusion(TINY, *models), 0)
    assert [type(m) for m in pipe.unet.modules()] == [type(m) for m in models[1].modules()]
    assert not {"sample", "decode", "generate"} & set(vars(pipe))


@pytest.mark.parametrize("name", [*EXACT_ON_CPU, "attention=math", "attention=flash+math", "deepcache=1"])
@torch.inference_mode()
def test_alone(make, name):
    assert_same(make(name), make(), 1e-5)


REFUSED = {
    frozenset(pair)
    for pair in (
        ("naive", "attention"),
        ("naive", "cpu-attention"),
        ("attention", "cpu-attention"),
        ("pointwise-linear", "cpu-linear"),
    )
}
"""Two switches for one thing."""


@pytest.mark.parametrize("pair", itertools.combinations((*EXACT_ON_CPU, "deepcache=1"), 2), ids=",".join)
@torch.inference_mode()
@pytest.mark.full(memory=False)
def test_pairs_compose_or_are_refused_by_name(make, pair):
    if frozenset(pair) in REFUSED:
        with pytest.raises(
            OptimizationError, match=f"{pair[0]} cannot be .* {pair[1]}|{pair[1]} cannot be .* {pair[0]}"
        ):
            make(*pair)
        return
    given, fast = inputs(), make(*pair)
    assert relative_error(fast.unet(*given), make().unet(*given)) < 1e-5
    put_there = {switch for row in fast.explain().rows for switch in row.switches}
    assert {name.partition("=")[0] for name in pair} <= put_there, "both are on"


@torch.inference_mode()
def test_all_at_once(make):
    everything = (*ALL, "deepcache=1", "guidance-interval=0.0-1.0", "vae-tiling=64")
    fast, plain = make(*everything, config=TINY), make(config=TINY)
    assert_same(fast, plain, 1e-5)
    for sampler in ("ddpm", "ddim", "dpmpp_2m", "Euler a Karras"):
        a, b = (pixels(pipe.generate(["a cat", "a dog"], sampler=sampler, steps=4, seed=3)) for pipe in (fast, plain))
        assert np.abs(a - b).max() <= 1


@torch.inference_mode()
def test_work_outside_of_inference_mode_and_after_it(make):
    fast, plain, given = make(*ALL), make(), inputs()
    fast.unet(*given)
    with torch.inference_mode(False), torch.no_grad():
        other = inputs(seed=5)
        assert relative_error(fast.unet(*other), plain.unet(*other)) < 1e-5


def test_every_exact_switch_of_a_cpu_is_tested_here(make):
    elsewhere = {"compile", "prepacked", "page-out"}  # test_compiled, test_onednn, test_memory
    pipe = make()
    here = {one.name for one in catalog().values() if one.exact and not one.needs.why_not(pipe)}
    assert {name for name in here - elsewhere if not name.startswith("fused")} == set(EXACT_ON_CPU)


# ---- weights that change


EACH_AND_ALL = [*([name] for name in EXACT_ON_CPU), list(ALL)]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("names", sparing(EACH_AND_ALL, lambda names: len(names) > 1), ids=",".join)
@torch.no_grad()
def test_changed_weights_are_seen(make, names, change):
    fast, plain, given = make(*names), make(), inputs()
    before = fast.unet(*given)
    fast.vae.decode(noise(1, 4, 8, 8))
    for pipe in (fast, plain):
        change(pipe.unet)
        change(pipe.vae)
    assert_same(fast, plain, 1e-5)
    assert relative_error(fast.unet(*given), before) > 1e-3


# ---- the stages of the UNet


@torch.inference_mode()
def test_staged_unet_is_the_plain_one_to_the_bit(make):
    staged, plain, given = make(), make(), inputs()
    staged.unet.__class__ = StagedUNet
    assert torch.equal(staged.unet(*given), plain.unet(*given))

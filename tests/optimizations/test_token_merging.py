"""Token merging against tomesd, the authors' package: its matching, and a whole UNet of diffusers' that it patches."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tomesd
import torch
from tomesd.merge import bipartite_soft_matching_random2d as theirs

from bench.reference.numbers import noise, pixels, relative_error
from bench.reference.oracles import diffusers_unet
from bench.reference.weights import TINY, tiny_config
from sd import optimizations
from sd.attention import naive_attention
from sd.optimizations import OptimizationError
from sd.optimizations.token_merging import match
from sd.unet import UNet
from tests.optimizations.stand_in import install
from tests.optimizations.support import DRAW, fresh, inputs, with_optimizations
from tests.sparing import sparing
from tests.weights import random_models

GRIDS = [(8, 8), (8, 4), (6, 16), (5, 8), (8, 5), (7, 9), (2, 2), (3, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_matching_is_tomesds(grid, ratio, dtype):
    """On even, odd and lying grids, for a batch whose rows are merged differently."""
    height, width = grid
    tokens, x = (noise(3, height * width, 24, seed=seed, dtype=dtype) for seed in (1, 2))
    count = int(height * width * ratio)
    merge, unmerge = theirs(tokens, width, height, 2, 2, count, no_rand=True)
    matching = match(tokens, grid, ratio)
    merged = matching.merge(x)
    assert merged.shape == merge(x).shape
    assert merged.shape[1] == height * width - min(count, height * width - (height // 2) * (width // 2))
    # As attention sees them: in any order, for theirs is an unstable sort's.
    assert relative_error(matching.part(attend(merged)), unmerge(attend(merge(x)))) < 1e-6


def attend(x: torch.Tensor) -> torch.Tensor:
    return naive_attention(x, x, x)


def test_what_is_not_merged_comes_back_as_it_was():
    tokens = noise(2, 64, 24)
    matching = match(tokens, (8, 8), 0.5)
    back = matching.part(matching.merge(tokens))
    same = (back == tokens).all(dim=-1)
    assert (same.sum(dim=1) >= 32 - 16).all(), "the sources that are left"
    assert (same.sum(dim=1) < 64 - 32).all(), "the merged ones, and where they went, are means"


def test_tokens_of_nothing_are_merged_without_nan():
    x = torch.zeros(1, 16, 8)
    matching = match(x, (4, 4), 0.5)
    assert torch.equal(matching.part(matching.merge(x)), x)


@torch.inference_mode()
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_a_call_is_that_of_diffusers_patched_by_tomesd(make, ratio):
    fast, plain = make(f"token-merging={ratio}", config=TINY), make(config=TINY)
    oracle = diffusers_unet(random_models(TINY)[1], TINY.unet)
    tomesd.apply_patch(oracle, ratio=ratio, use_rand=False)
    for height, width, batch in ((8, 8, 2), (16, 8, 2), (8, 24, 3)):
        x, t, context = noise(batch, 4, height, width, seed=width), torch.tensor(541), noise(batch, 77, 64, seed=1)
        actual = fast.unet(x, t, context)
        assert relative_error(actual, oracle(x, t, context).sample) < 1e-5
        assert relative_error(actual, plain.unet(x, t, context)) > 1e-2, "it does something"


def tokens_attended(unet: UNet) -> list[int]:
    """The tokens that each self-attention projects, in order."""
    seen: list[int] = []
    hooks = [
        module.register_forward_hook(lambda _, given, out: seen.append(out.shape[1]))
        for name, module in unet.named_modules()
        if name.endswith("attn1.to_q")
    ]
    unet(*inputs(side=16))
    for hook in hooks:
        hook.remove()
    return seen


@torch.inference_mode()
def test_the_finest_level_alone_is_merged(make):
    plain, fast = (tokens_attended(make(*names, config=TINY).unet) for names in ([], ["token-merging=0.25"]))
    assert {(a, b) for a, b in zip(plain, fast, strict=True)} == {(256, 192), (64, 64), (16, 16), (4, 4)}


# ---- beside others


@torch.inference_mode()
@pytest.mark.parametrize(
    "others",
    [
        ["packed-qkv"],
        ["kv-cache", "time-cache"],
        ["channels-last", "pointwise-linear"],
        ["cpu-attention", "cpu-linear", "cpu-norm", "winograd"],
        ["attention=math"],
        ["naive"],
    ],
    ids=",".join,
)
def test_a_call_beside_others(make, others):
    fast, alone = make("token-merging", *others), make("token-merging")
    assert relative_error(fast.unet(*inputs(side=16)), alone.unet(*inputs(side=16))) < 1e-5


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.full(memory=False)
@pytest.mark.skipif(INTERPRETED, reason="is the process itself")
def test_under_tritons_interpreter():
    """It must be chosen before Triton is imported: in a process of its own."""
    pytest.importorskip("triton", reason="fused kernels need Triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "fused_blocks", __file__]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_under_tritons_interpreter starts")
@torch.inference_mode()
def test_a_call_beside_fused_blocks(tokenizer):
    """They are given a bias apart, which likeness is measured with."""
    small = tiny_config(unet={"norm_groups": 4, "channel_mult": (1, 2), "attention_levels": (0,)})
    models = random_models(small)
    fused = fresh(models, tokenizer, small), ["token-merging", "packed-qkv", "fused-layernorm", "fused-geglu"]
    alone = fresh(models, tokenizer, small), ["token-merging"]
    fast, plain = (with_optimizations(pipe, *names) for pipe, names in (fused, alone))
    assert relative_error(fast.unet(*inputs()), plain.unet(*inputs())) < 1e-5


def draw(pipe, **changes) -> np.ndarray:
    return pixels(pipe.generate(**{"prompt": ["a cat", "a dog"], **DRAW, **changes}))


@pytest.mark.parametrize(
    "others", [["shared-halves"], ["shared-halves", "packed-qkv", "kv-cache"], ["keep-memory", "async-noise"]], ids=str
)
def test_pictures_beside_others(make, others):
    for changes in ({}, {"cfg_scale": 1}):
        fast, alone = draw(make("token-merging", *others), **changes), draw(make("token-merging"), **changes)
        assert np.abs(fast - alone).max() <= 1


@pytest.mark.parametrize("others", [["deepcache=2"], ["guidance-interval=0.0-0.5"]], ids=str)
def test_beside_other_approximations_both_count(make, others):
    both, first, second = draw(make("token-merging", *others)), draw(make("token-merging")), draw(make(*others))
    assert np.abs(both - first).max() > 1
    assert np.abs(both - second).max() > 1


@pytest.mark.parametrize("graph", sparing(["cuda-graph", "loop-graph"], lambda graph: graph == "cuda-graph"))
def test_graphs(make, monkeypatch, graph):
    """Nothing in it waits for the device, and what is merged follows the picture."""
    captured = install(monkeypatch)
    names = "token-merging", "kv-cache", "shared-halves", "deepcache=2"
    pipe, plain = make(*names, graph), make(*names)
    for changes in ({}, {"seed": 8}, {"prompt": ["a fox", "a tree"]}, {"height": 32}, {}):
        assert np.abs(draw(pipe, **changes) - draw(plain, **changes)).max() <= 1
    assert captured.replays > len(captured.captured)


def test_a_picture_is_the_same_in_any_batch(make):
    pipe = make("token-merging")
    both = draw(pipe, seed=[3, 4])
    assert np.abs(draw(pipe, prompt="a dog", seed=4)[0] - both[1]).max() <= 1


# ---- the switch


@pytest.mark.parametrize("value", ["0", "0.76", "1", "-0.5", "nan", "half", ""])
def test_ratios_that_are_none(value):
    with pytest.raises(OptimizationError, match="the value must be a fraction of the tokens over 0"):
        optimizations.check(f"token-merging={value}")


def test_explain_and_undo(make):
    pipe, plain = make("token-merging=0.25", "packed-qkv"), make()
    kernels = {row.kernel for row in pipe.explain().rows if "token-merging" in row.switches and "attn1" in row.module}
    assert kernels == {"one product for q, k, v, 25% of the tokens merged, attention: SDPA, as PyTorch picks"}
    optimizations.undo(pipe)
    assert np.array_equal(draw(pipe), draw(plain))
    assert pipe.explain() == plain.explain()

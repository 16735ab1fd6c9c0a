"""Undo: the plain pipeline again, bit for bit, and nothing left behind; and the pipeline can be optimized anew."""

import numpy as np
import pytest
import torch

from bench.reference.numbers import pixels, relative_error
from sd import optimizations
from sd.optimizations import OptimizationError, catalog, onednn
from sd.pipeline import StableDiffusion
from tests.optimizations.stand_in import install
from tests.optimizations.support import DRAW, change_in_place, inputs
from tests.sparing import sparing

LOSSLESS = [name for name, one in catalog().items() if one.exact]
VALUES = {
    "deepcache": "deepcache=2",
    "guidance-interval": "guidance-interval=0.0-0.5",
    "tgate": "tgate=2",
    "vae-tiling": "vae-tiling=16",
}
HERE = [VALUES.get(name, name) for name, one in catalog().items() if name not in ("float8", "compile")]
"""All switches that can be applied on a CPU, with the stand-in for graphs and Triton's interpreter."""

PRESETS = ["exact", "cpu", "fast", "original", "default"]


@pytest.fixture(autouse=True)
def everything_runs_here(monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr(onednn, "MIN_WEIGHTS", 0)


def traces(pipe: StableDiffusion) -> dict:
    """Classes, own attributes, hooks, and the weights' types and layouts: what undo must give back."""
    parts = {"clip": pipe.clip, "unet": pipe.unet, "vae": pipe.vae}
    modules = {name: m for part, model in parts.items() for name, m in model.named_modules(prefix=part)}
    weights = {name: w for part, model in parts.items() for name, w in model.named_parameters(prefix=part)}
    return {
        "pipe": {key for key in vars(pipe) if key != "tokenizer"},
        "dtype": pipe.dtype,
        "classes": {name: type(m) for name, m in modules.items()},
        "attributes": {name: set(vars(m)) for name, m in modules.items()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
        "weights": {name: (type(w), w.dtype, w.shape, w.stride()) for name, w in weights.items()},
    }


def numbers(pipe: StableDiffusion) -> dict[str, torch.Tensor]:
    parts = {"clip": pipe.clip, "unet": pipe.unet, "vae": pipe.vae}
    return {f"{part}.{name}": w for part, model in parts.items() for name, w in model.state_dict().items()}


def draw(pipe: StableDiffusion) -> np.ndarray:
    return pixels(pipe.generate(["a cat", "a dog"], **DRAW))


def needs_triton(name: str) -> bool:
    return name.startswith("fused") or name == "split-conv"


CHAIN = "channels-last,packed-qkv,kv-cache,time-cache,deepcache=2,fp16"
NOW = ("cpu", "int8-weights", "cuda-graph", CHAIN)


@pytest.mark.parametrize("names", sparing([*HERE, *PRESETS, CHAIN], lambda names: names in NOW))
def test_undo_gives_the_plain_pipeline_back_and_apply_the_same_as_before(request, loaded, names):
    if names in ("cpu-bf16", "cpu-int8"):
        request.getfixturevalue("as_if_there_were_amx")
    if needs_triton(names):
        pytest.skip("in test_fused.py, under Triton's interpreter")
    pipe = loaded()
    plain, before, weights = draw(pipe), traces(pipe), {k: v.clone() for k, v in numbers(pipe).items()}
    first = optimizations.apply(pipe, names)
    fast = draw(pipe)
    optimizations.undo(pipe)
    assert traces(pipe) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in numbers(pipe).items())
    assert np.array_equal(draw(pipe), plain)
    assert optimizations.apply(pipe, names) == first
    assert np.array_equal(draw(pipe), fast)
    optimizations.undo(pipe)
    assert np.array_equal(draw(pipe), plain)


def test_undo_of_nothing_is_nothing(loaded):
    pipe = loaded()
    before = traces(pipe)
    optimizations.undo(pipe)
    assert traces(pipe) == before


@pytest.mark.parametrize(
    "names", sparing(["fp16", "bf16", "int8-weights", "int8-static"], lambda n: n == "int8-weights")
)
def test_undo_without_a_file_says_so_and_changes_nothing(make, names):
    pipe = make("channels-last", names)
    before, picture = traces(pipe), draw(pipe)
    with pytest.raises(OptimizationError, match=f"{names} cannot be undone: no file holds the weights"):
        optimizations.undo(pipe)
    assert traces(pipe) == before
    assert np.array_equal(draw(pipe), picture)


@pytest.mark.parametrize("names", ["channels-last,packed-qkv", "winograd,kv-cache,time-cache", "cpu"])
def test_what_is_lossless_is_undone_without_a_file(make, names):
    pipe, plain = make(), make()
    optimizations.apply(pipe, names)
    pipe.generate("a cat", **DRAW)
    optimizations.undo(pipe)
    assert np.array_equal(draw(pipe), draw(plain))
    assert {k: v.stride() for k, v in numbers(pipe).items()} == {k: v.stride() for k, v in numbers(plain).items()}


@torch.no_grad()
@pytest.mark.parametrize("names", sparing(["channels-last,packed-qkv", "cpu"], lambda names: names == "cpu"))
def test_weights_written_to_since_are_kept_where_nothing_was_converted_away(loaded, names):
    """A fine-tune, or a LoRA that was merged while optimized."""
    pipe, other = loaded(names), loaded()
    for each in (pipe, other):
        change_in_place(each.unet)
    optimizations.undo(pipe)
    assert all(torch.equal(weight, numbers(other)[name]) for name, weight in numbers(pipe).items())
    # Not to the bit: products of unaligned weights, as a mapped file's are, are summed in another order.
    assert relative_error(pipe.unet(*inputs()), other.unet(*inputs())) < 1e-5


@torch.no_grad()
def test_weights_changed_before_are_not_taken_from_the_file(loaded):
    pipe = loaded()
    change_in_place(pipe.unet)
    optimizations.apply(pipe, "fp16")
    with pytest.raises(OptimizationError, match="fp16 cannot be undone"):
        optimizations.undo(pipe)


def test_undone_weights_are_the_files_again(loaded):
    """No second copy: what was converted comes back mapped from the file."""
    from sd.checkpoints.mapped import mapped

    pipe = loaded()
    there = len(mapped(pipe.unet.parameters()))
    optimizations.apply(pipe, "fp16")
    assert not mapped(pipe.unet.parameters())
    optimizations.undo(pipe)
    assert len(mapped(pipe.unet.parameters())) == there


def test_a_file_that_has_changed_is_noticed(make, tmp_path):
    path = tmp_path / "model.safetensors"
    make().save(path)
    pipe = StableDiffusion.load(path, "cpu")
    optimizations.apply(pipe, "fp16")
    other = make()
    change_in_place(other.unet)
    other.save(path)
    with pytest.raises(ValueError, match="has changed since it was loaded"):
        optimizations.undo(pipe)

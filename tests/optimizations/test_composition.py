"""Optimizations beside each other and in trouble: what is recorded is on, what fails leaves nothing, what is written is
seen. Each test here stands for a fault that there was."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from bench.reference.numbers import pixels, relative_error
from bench.reference.weights import tiny_config
from sd import optimizations
from sd.checkpoints.errors import CheckpointError
from sd.checkpoints.mapped import mapped
from sd.checkpoints.stamps import Stamp
from sd.optimizations import OptimizationError, onednn, quantization, registry
from sd.optimizations.base import Optimization, Patch, Stage
from sd.optimizations.quantization import quantize
from sd.optimizations.quantized_files import load_quantized, save_quantized
from sd.pipeline import StableDiffusion
from tests.optimizations.support import DRAW, EXACT_ON_CPU, change_in_place, inputs
from tests.sparing import sparing
from tests.weights import random_models


def draw(pipe: StableDiffusion, **changes) -> np.ndarray:
    return pixels(pipe.generate("a cat", **{**DRAW, **changes}))


def state(pipe: StableDiffusion) -> tuple:
    models = (pipe.clip, pipe.unet, pipe.vae)
    classes = [type(m) for model in models for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) for model in models for m in model.modules()]
    return classes, hooks, pipe.dtype, pipe.optimizations, "record" in vars(pipe)


# ---- chains of conversions


CHAINS = ["fp16,int8-weights", "bf16,int8-dynamic", "fp16,int8-weights,channels-last,kv-cache"]
QUANTIZED = ["int8-static,attention", "int8-static,cpu-attention", "int8-weights,attention=math"]


@pytest.mark.parametrize("names", sparing(CHAINS, lambda names: names == CHAINS[0]))
def test_conversions_on_conversions_are_undone_from_the_file(loaded, names):
    pipe = loaded()
    plain = draw(pipe)
    optimizations.apply(pipe, names)
    draw(pipe)
    optimizations.undo(pipe)
    assert np.array_equal(draw(pipe), plain)


# ---- failing halfway


@pytest.mark.parametrize("names", ["fp16,channels-last,attention=efficient", "channels-last,packed-qkv,prepacked"])
def test_a_failed_apply_leaves_the_pipeline_as_it_was(loaded, names):
    pipe = loaded()
    before, there = state(pipe), len(mapped(pipe.unet.parameters()))
    with pytest.raises(OptimizationError):
        optimizations.apply(pipe, names)
    assert state(pipe) == before
    assert len(mapped(pipe.unet.parameters())) == there, "no copies of weights are left"
    assert optimizations.apply(pipe, "kv-cache") == ["kv-cache"]


def test_what_cannot_be_taken_back_stays_and_is_recorded(make):
    """fp16 of a pipeline from no file cannot be undone when a later one fails."""
    pipe = make()
    with pytest.raises(OptimizationError, match=r"no such attention for .*; fp16 stays applied: fp16 cannot be undone"):
        optimizations.apply(pipe, "fp16,channels-last,attention=efficient")
    assert (pipe.dtype, pipe.optimizations) == (torch.float16, ["fp16"])
    assert {switch for row in pipe.explain().rows for switch in row.switches} == {"fp16"}
    assert draw(pipe).std() > 1


def test_a_presets_failure_that_cannot_be_taken_back_is_recorded_beside_the_others(make, monkeypatch):
    def failing(patch: Patch) -> None:
        patch.converts(patch.unet)
        patch.unet.half()
        raise OptimizationError("failing fails")

    one = Optimization("failing", failing, Stage.MEMORY, exact=False, summary="")
    known = {**registry.catalog(), "failing": one}
    monkeypatch.setattr(registry, "catalog", lambda: known)
    monkeypatch.setattr(registry, "PRESETS", {**registry.PRESETS, "mine": lambda pipe: ("failing",)})
    pipe = make()
    with pytest.raises(OptimizationError, match="failing fails; kv-cache, failing stays applied"):
        optimizations.apply(pipe, "kv-cache,mine")
    assert pipe.optimizations == ["kv-cache", "failing"]
    assert [patch.name for patch in pipe.record.patches] == pipe.optimizations


def test_a_preset_that_finds_nothing_left_does_not_calibrate_again(loaded, monkeypatch):
    calibrations = []
    calibrate = quantization.calibrate
    monkeypatch.setattr(quantization, "calibrate", lambda *given: (calibrations.append(1), calibrate(*given)))
    pipe = loaded("int8-static", "cpu")
    assert "int8-static" in pipe.optimizations
    assert len(calibrations) == 1


# ---- what is recorded is on


@pytest.mark.parametrize("names", ["fp16,winograd", "fp16,cpu-linear", "bf16,prepacked", "fp16,int8-static"])
def test_needs_are_those_of_the_dtype_that_is_chosen(loaded, names):
    with pytest.raises(OptimizationError, match=r"needs .*fp32.*; this is cpu in|cannot be combined"):
        loaded(names)


def test_a_preset_leaves_out_what_the_chosen_dtype_cannot(loaded):
    assert not {"winograd", "cpu-linear", "cpu-norm"} & set(loaded("cpu,fp16").optimizations)


@pytest.mark.parametrize("name", EXACT_ON_CPU)
def test_every_applied_switch_is_explained(make, name):
    assert name in {switch for row in make(name).explain().rows for switch in row.switches}


def test_quantized_layers_are_left_to_their_own_kernels(make, monkeypatch):
    monkeypatch.setattr(onednn, "MIN_WEIGHTS", 0)
    pipe = make("int8-weights", "cpu-linear", "prepacked")
    quantized = [m for m in pipe.unet.modules() if isinstance(m, nn.Linear) and type(m.weight) is not nn.Parameter]
    assert quantized
    assert {type(m) for m in quantized} == {nn.Linear}
    assert draw(pipe).std() > 1


@pytest.mark.parametrize("names", sparing(QUANTIZED, lambda names: names == QUANTIZED[0]))
def test_attention_of_quantized_layers(make, names):
    assert draw(make(names)).std() > 1


def test_layers_are_quantized_before_others_are_swapped(make, tmp_path):
    pipe = make()
    quantize(pipe, "int8_weight_only")
    save_quantized(pipe, tmp_path / "q.safetensors")
    other = make("cpu-linear")
    for call in (
        lambda: load_quantized(other, tmp_path / "q.safetensors"),
        lambda: quantize(other, "int8_weight_only"),
    ):
        with pytest.raises(OptimizationError, match="quantize first: this pipeline has cpu-linear"):
            call()


# ---- what is written is seen


@torch.no_grad()
def test_weights_written_to_behind_autograds_back_can_be_told_of(make):
    fast, plain, given = make("kv-cache", "time-cache", "packed-qkv", "winograd"), make(), inputs()
    fast.unet(*given)
    for pipe in (fast, plain):
        for parameter in pipe.unet.parameters():
            parameter.data.mul_(1.1)
    assert relative_error(fast.unet(*given), plain.unet(*given)) > 1e-3, "it cannot be noticed"
    optimizations.weights_changed(fast)
    assert relative_error(fast.unet(*given), plain.unet(*given)) < 1e-5


def test_a_stamp_tells_a_tensor_from_another_at_its_address():
    weight = nn.Parameter(torch.zeros(3))
    stamp = Stamp([weight])
    assert stamp == Stamp([weight])
    other = nn.Parameter(weight.detach())
    assert other.data_ptr() == weight.data_ptr()
    assert stamp != Stamp([other])
    with torch.no_grad():
        weight.add_(1)
    assert stamp != Stamp([weight])


@torch.no_grad()
def test_applied_and_undone_within_inference_mode(loaded):
    plain = loaded()
    with torch.inference_mode():
        fast = loaded("channels-last", "packed-qkv", "time-cache")
        optimizations.undo(fast)
        optimizations.apply(fast, "kv-cache,time-cache,packed-qkv,winograd")
    fast.unet(*inputs())
    for pipe in (fast, plain):
        change_in_place(pipe.unet)
    assert relative_error(fast.unet(*inputs()), plain.unet(*inputs())) < 1e-5


# ---- copies, calls, files


@torch.no_grad()
def test_a_copy_of_an_optimized_unet_does_not_use_the_originals_parts(make):
    pipe = make("packed-qkv", "shared-halves")
    with pytest.raises(OptimizationError, match="a copy of an optimized one"):
        copy.deepcopy(pipe.unet)(*inputs())
    optimizations.undo(pipe)
    assert torch.equal(copy.deepcopy(pipe.unet)(*inputs()), pipe.unet(*inputs()))


@torch.no_grad()
def test_the_context_may_be_named(make):
    x, t, context = inputs()
    assert torch.equal(make("kv-cache").unet(x, t, context=context), make("kv-cache").unet(x, t, context))


@torch.no_grad()
def test_hooks_of_others_are_called(make):
    """A layer that somebody watches is called, and not its kernel beside it."""
    pipe, seen = make("winograd", "cpu-norm"), []
    pipe.unet.middle_block[0].in_layers[2].register_forward_hook(lambda *given: seen.append(1))
    pipe.unet(*inputs())
    assert seen == [1]


@pytest.mark.parametrize("names", ["int8-weights", "int8-static"])
def test_quantized_models_are_not_written_as_checkpoints(make, tmp_path, names):
    with pytest.raises(CheckpointError, match="some layers are quantized"):
        make(names).save(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_one_of_a_split_checkpoints_files_has_changed(tmp_path):
    config = tiny_config()
    path = tmp_path / "model.safetensors"
    from sd.model_loader import save

    save(path, config, *random_models(config), max_bytes=4_000_000)
    pipe = StableDiffusion.load(tmp_path / "model.safetensors.index.json", "cpu")
    optimizations.apply(pipe, "fp16")
    save(path, config, *random_models(config, seed=1), max_bytes=4_000_000)
    with pytest.raises(ValueError, match="has changed since it was loaded"):
        optimizations.undo(pipe)


def test_a_moved_pipeline_still_has_its_file(loaded):
    pipe = loaded()
    plain = draw(pipe)
    pipe.to("cpu")
    optimizations.apply(pipe, "fp16")
    optimizations.undo(pipe)
    assert np.array_equal(draw(pipe), plain)


def test_what_apply_returns_is_the_callers(make):
    pipe = make()
    optimizations.apply(pipe, "kv-cache").clear()
    assert pipe.optimizations == ["kv-cache"]


@pytest.mark.parametrize(
    ("names", "budget", "expected"),
    [
        ("cpu,winograd", "low", "winograd=0.40"),
        ("cpu,winograd=1", "low", "winograd=1"),
        ("cpu", "low", "winograd=0.40"),
    ],
)
def test_a_budget_holds_unless_a_value_was_typed(loaded, names, budget, expected):
    pipe = loaded()
    optimizations.apply(pipe, names, memory_budget=budget)
    assert expected in pipe.optimizations


def test_a_preset_takes_no_value(make):
    with pytest.raises(OptimizationError, match="exact is a preset and takes no value"):
        make("exact=3")

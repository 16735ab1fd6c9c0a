"""cpu-int8: calibrated ranges, what stays in bf16, and files of the ranges."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bench.reference.numbers import pixels, relative_error
from sd import optimizations
from sd.kernels import dots
from sd.optimizations import OptimizationError, cpu_int8
from sd.optimizations.base import Record
from sd.optimizations.quantization import Quantization, calibrate
from sd.optimizations.quantized_files import load_quantized, save_quantized, scheme_of
from sd.pipeline import StableDiffusion
from tests.optimizations.support import DRAW, change_in_place, inputs


@pytest.fixture(autouse=True)
def calibrated_soon(as_if_there_were_amx, monkeypatch):
    """In two steps of one prompt."""
    monkeypatch.setattr(cpu_int8.cpu_int8.function, "__defaults__", (("a cat",), 2, None, None))


def unet(pipe) -> torch.Tensor:
    return pipe.unet(*inputs(2, 8, t=501))


@torch.inference_mode()
def test_further_from_fp32_than_bf16_but_near(make):
    expected = unet(make())
    bf16, int8 = (relative_error(unet(make(name)), expected) for name in ("cpu-bf16", "cpu-int8"))
    assert bf16 < int8 < 0.1


@torch.inference_mode()
def test_as_far_from_fp32_as_numbers_rounded_in_pytorch(make):
    """Each product's left side and weights are rounded as the ranges say, around layers of PyTorch's own.

    Which of two neighbours a number is rounded to hangs on the last bit of what was before, so the errors' sizes agree.
    """
    pipe, plain = make("cpu-int8"), make()
    scales = cpu_int8.scales_of(pipe.unet)
    for name, module in plain.unet.named_modules():
        if name in scales and isinstance(module, nn.Conv2d | nn.Linear):
            round_as(module, scales[name])
        elif name.endswith("attn1") and name in scales:
            for part in (module.to_q, module.to_k, module.to_v):
                round_as(part, scales[name])
        elif name.endswith("ff.net.0") and name in scales:
            round_as(module.proj, scales[name])
    expected = unet(make())
    assert relative_error(unet(pipe), expected) == pytest.approx(relative_error(unet(plain), expected), rel=0.35)


def round_as(layer: nn.Module, scale: dots.Scale) -> None:
    def left(module: nn.Module, given: tuple) -> tuple:
        x = given[0]
        return (((x * scale.factor + scale.zero).round().clamp(0, 255) - scale.zero) / scale.factor,)

    layer.register_forward_pre_hook(left)
    unit = layer.weight.abs().flatten(1).amax(1).view(-1, *[1] * (layer.weight.ndim - 1)) / 127
    layer.weight.copy_((layer.weight / unit).round() * unit)


def test_what_is_int8_and_what_stays(make):
    pipe = make("cpu-int8")
    done: Quantization = pipe.unet.quantization
    assert (done.scheme, done.switch) == ("cpu_int8", "cpu-int8")
    kinds = {name: m.packed.kind for name, m in pipe.unet.named_modules() if hasattr(m, "packed")}
    assert {name for name, kind in kinds.items() if kind == "int8"} == set(done.layers)
    stays = ("skip_connection", "ff.net.2", ".op", ".conv", "to_k", "to_v", "input_blocks.0.0", "out.2")
    assert not [name for name in done.layers if name.endswith(stays)]
    first = [name for name in done.layers if name.startswith("input_blocks.1.")]
    assert "input_blocks.1.0.in_layers.2" in first
    assert any(name.endswith("attn1") for name in first)
    assert any(name.endswith("ff.net.0") for name in first)
    assert any(name.endswith("attn2.to_q") for name in first)
    assert any(name.endswith("proj_in") for name in first)


def test_a_layer_alone(make):
    name = "input_blocks.1.0.in_layers.2"
    pipe = make()
    record = Record(pipe)
    cpu_int8.cpu_int8.function(record.patch("cpu-int8"), layers=[name])
    assert list(cpu_int8.scales_of(pipe.unet)) == [name]
    record.undo()
    with pytest.raises(OptimizationError, match=r"cpu-int8 cannot take time_embed\.0"):
        cpu_int8.cpu_int8.function(Record(pipe).patch("cpu-int8"), layers=["time_embed.0"])


def test_ranges_hold_what_was_seen(make):
    """Of a product whose left side can be computed: the norm before it, in PyTorch."""
    pipe, plain = make("cpu-int8"), make()
    seen = []
    layers = plain.unet.input_blocks[1][0].in_layers
    layers[2].register_forward_pre_hook(lambda module, given: seen.append(torch.aminmax(given[0])))
    with torch.inference_mode():
        calibrate(plain, ("a cat",), 2, None)
    low, high = (min(s.min.item() for s in seen), max(s.max.item() for s in seen))
    scale = cpu_int8.scales_of(pipe.unet)["input_blocks.1.0.in_layers.2"]
    assert (0 - scale.zero) / scale.factor == pytest.approx(low, abs=0.05 * (high - low))
    assert (255 - scale.zero) / scale.factor == pytest.approx(high, abs=0.05 * (high - low))


def test_calibration_needs_a_prompt(make):
    with pytest.raises(OptimizationError, match="at least one prompt"):
        cpu_int8.cpu_int8.function(Record(make()).patch("cpu-int8"), prompts=())


@pytest.mark.parametrize("others", ["kv-cache,time-cache,shared-halves,deepcache=2", "token-merging=0.5", "tgate=2"])
def test_beside_other_switches(make, others):
    def draw(pipe) -> np.ndarray:
        return pixels(pipe.generate(["a cat", "a dog"], **DRAW)).astype(float)

    difference = np.abs(draw(make("cpu-int8", others)) - draw(make(others))).mean()
    assert 0 < difference < (20 if "merging" in others else 8)


def test_undo_and_again(loaded):
    pipe = loaded()
    plain = pixels(pipe.generate("a cat", **DRAW))
    optimizations.apply(pipe, "cpu-int8")
    first = pixels(pipe.generate("a cat", **DRAW))
    optimizations.undo(pipe)
    assert not hasattr(pipe.unet, "quantization")
    assert np.array_equal(pixels(pipe.generate("a cat", **DRAW)), plain)
    optimizations.apply(pipe, "cpu-int8")
    assert np.array_equal(pixels(pipe.generate("a cat", **DRAW)), first)


def test_a_file_of_the_ranges(loaded, tmp_path):
    pipe, other = loaded("cpu-int8"), loaded()
    file = tmp_path / "ranges.safetensors"
    save_quantized(pipe, file)
    assert file.stat().st_size < 100_000
    assert set(load_file(file)) == set(pipe.unet.quantization.layers)
    assert scheme_of(file) == "cpu_int8"
    load_quantized(other, file)
    assert other.unet.quantization.layers == pipe.unet.quantization.layers
    assert torch.equal(unet(other), unet(pipe))
    optimizations.undo(other)
    assert torch.equal(unet(other), unet(loaded()))


@pytest.mark.parametrize(("saved", "read"), [(torch.float16, torch.float16), (torch.float32, torch.float16)])
def test_a_file_of_weights_of_any_type(make, tmp_path, saved, read):
    """Of the same numbers: fp16's, in fp32 as well."""
    plain = make()
    for model in (plain.clip, plain.unet, plain.vae):
        for weight in model.parameters():
            weight.copy_(weight.half())
    plain.save(tmp_path / "weights.safetensors")
    pipe, other = (StableDiffusion.load(tmp_path / "weights.safetensors", "cpu", dtype) for dtype in (saved, read))
    optimizations.apply(pipe, "cpu-int8")
    save_quantized(pipe, tmp_path / "ranges.safetensors")
    load_quantized(other, tmp_path / "ranges.safetensors")
    assert torch.equal(unet(other), unet(pipe))


@torch.no_grad()
def test_a_file_of_other_weights_is_refused(loaded, tmp_path):
    save_quantized(loaded("cpu-int8"), tmp_path / "ranges.safetensors")
    other = loaded()
    change_in_place(other.unet)
    with pytest.raises(ValueError, match="made from other weights"):
        load_quantized(other, tmp_path / "ranges.safetensors")


def test_a_file_where_int8_is_slow_is_refused(loaded, tmp_path, monkeypatch):
    save_quantized(loaded("cpu-int8"), tmp_path / "ranges.safetensors")
    monkeypatch.setattr(dots, "fast", lambda: False)
    with pytest.raises(ValueError, match="needs a CPU with AMX or AVX512-BF16"):
        load_quantized(loaded(), tmp_path / "ranges.safetensors")


@torch.no_grad()
def test_what_is_written_to_the_weights_is_packed_again(make):
    pipe, plain = make("cpu-int8"), make()
    unet(pipe)
    for each in (pipe, plain):
        each.unet.middle_block[0].in_layers[2].weight.mul_(-1)
    assert relative_error(unet(pipe), unet(plain)) < 0.1
    assert relative_error(unet(plain), unet(make())) > 0.2

"""cpu-bf16: nearer to fp32 than a model in bf16, from weights of any type, beside the other switches."""

import numpy as np
import pytest
import torch
from torch import nn

from bench.reference.numbers import noise, pixels, relative_error
from sd import optimizations
from sd.kernels import dots, native
from sd.optimizations import OptimizationError, dot_layers
from sd.optimizations.dot_layers import DotConv, DotLinear
from tests.optimizations.support import CHANGES, DRAW, fresh, inputs
from tests.sparing import sparing

pytestmark = pytest.mark.usefixtures("as_if_there_were_amx")
IMAGES = noise(1, 3, 64, 64, seed=4).clamp(-1, 1)
CALLS = {
    "unet": lambda pipe: pipe.unet(*(x.to(pipe.dtype) if x.is_floating_point() else x for x in inputs(2, 16))),
    "decode": lambda pipe: pipe.vae.decode(noise(2, 4, 8, 8).to(pipe.dtype)),
    "encode": lambda pipe: torch.cat(pipe.vae.encode(IMAGES.to(pipe.dtype))),
    "text": lambda pipe: pipe.clip(torch.arange(154).view(2, 77)),
}


@pytest.mark.parametrize("call", CALLS)
@torch.inference_mode()
def test_nearer_to_fp32_than_bf16_as_a_whole(make, call):
    expected = CALLS[call](make())
    error = relative_error(CALLS[call](make("cpu-bf16")), expected)
    whole = relative_error(CALLS[call](make("bf16")), expected)
    assert error < 0.75 * whole
    assert (error > 1e-4) is (call != "text")  # the text encoder stays in fp32


@torch.inference_mode()
def test_odd_sizes_and_one_picture(make):
    fast, plain = make("cpu-bf16"), make()
    for batch, height, width in ((1, 8, 24), (3, 40, 8)):
        x, t, context = noise(batch, 4, height, width), torch.tensor(7), noise(batch, 77, 64, seed=1)
        assert relative_error(fast.unet(x, t, context), plain.unet(x, t, context)) < 2e-2


def test_every_product_but_the_timesteps(make):
    pipe = make("cpu-bf16")
    left = [
        name
        for model in (pipe.unet, pipe.vae)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not isinstance(layer, DotLinear | DotConv)
    ]
    assert left
    assert all("time_embed" in name or "emb_layers" in name or "quant_conv" in name for name in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_type_stay_where_they_are(loaded, dtype):
    pipe, plain = loaded(dtype=dtype), loaded(dtype=torch.float32)
    before = dict(pipe.unet.named_parameters())
    optimizations.apply(pipe, "cpu-bf16")
    assert pipe.dtype == torch.float32
    kept = [name for name, weight in pipe.unet.named_parameters() if weight is before[name]]
    assert "middle_block.0.in_layers.2.weight" in kept
    others = {name: weight for name, weight in pipe.unet.named_parameters() if weight.ndim == 1}
    assert {weight.dtype for weight in others.values()} == {torch.float32}
    assert relative_error(CALLS["unet"](pipe), CALLS["unet"](plain)) < 2e-2
    optimizations.undo(pipe)
    assert pipe.dtype == dtype
    assert {weight.dtype for weight in pipe.unet.parameters()} == {dtype}


def test_undone_without_a_file(models, tokenizer):
    pipe = fresh(models, tokenizer)
    for model in (pipe.clip, pipe.unet, pipe.vae):
        model.half()
    pipe.dtype = torch.float16
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    optimizations.apply(pipe, "cpu-bf16")
    pipe.generate("a cat", **DRAW)
    optimizations.undo(pipe)
    assert pipe.dtype == torch.float16
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.unet.state_dict().items())


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_is_written_to_the_weights_is_packed_again(make, change):
    pipe, plain = make("cpu-bf16"), make()
    for call in ("unet", "decode"):
        CALLS[call](pipe)
    for each in (pipe, plain):
        change(each.unet)
        change(each.vae)
    for call in ("unet", "decode"):
        assert relative_error(CALLS[call](pipe), CALLS[call](plain)) < 2e-2


BESIDE = ["kv-cache", "time-cache", "shared-halves", "deepcache=2", "tgate=2", "token-merging=0.5", "vae-tiling"]


MANY = "kv-cache,time-cache,shared-halves,deepcache=2"


def draw(pipe) -> np.ndarray:
    return pixels(pipe.generate(["a cat", "a dog"], **DRAW)).astype(float)


@pytest.mark.parametrize("others", sparing([*BESIDE, MANY], ("tgate=2", "token-merging=0.5", MANY).__contains__))
def test_beside_other_switches(make, others):
    plain = make(others)
    fast, expected = draw(make("cpu-bf16", others)), draw(plain)
    another = pixels(plain.generate(["a cat", "a dog"], **{**DRAW, "seed": 8})).astype(float)
    difference = np.abs(fast - expected).mean()
    assert 0 < difference < (7 if "merging" in others else 2.5)  # near ties are merged otherwise
    assert np.abs(another - expected).mean() > 3 * difference


@torch.inference_mode()
def test_without_amx_the_vae_stays_in_fp32_for_the_switches_of_fp32(make, monkeypatch):
    monkeypatch.setattr(dot_layers, "with_vae", lambda: False)
    pipe, plain = make("cpu-bf16", "cpu"), make()
    assert {"winograd", "cpu-attention", "cpu-norm", "cpu-linear"} <= set(pipe.optimizations)
    assert relative_error(CALLS["decode"](pipe), CALLS["decode"](plain)) < 1e-4
    assert 1e-4 < relative_error(CALLS["unet"](pipe), CALLS["unet"](plain)) < 2e-2
    assert not any(isinstance(layer, DotConv | DotLinear) for layer in pipe.vae.modules())
    optimizations.undo(pipe)
    assert torch.equal(CALLS["unet"](pipe), CALLS["unet"](plain))
    assert torch.equal(CALLS["decode"](pipe), CALLS["decode"](plain))


def test_with_amx_a_preset_leaves_out_what_finds_nothing(make):
    assert not {"winograd", "cpu-attention"} & set(make("cpu-bf16", "cpu").optimizations)


def test_a_preset_of_a_model_in_16_bits_is_of_bf16_products(loaded):
    pipe = loaded("cpu", dtype=torch.bfloat16)
    assert pipe.optimizations[0] == "cpu-bf16"
    assert pipe.dtype == torch.float32


@pytest.mark.parametrize("other", ["bf16", "fp16", "channels-last", "packed-qkv", "compile", "attention=math"])
def test_what_it_cannot_stand_beside_is_named(make, other):
    pipe = make()
    with pytest.raises(OptimizationError, match=f"cannot be combined with ({other.partition('=')[0]}|cpu-bf16)"):
        optimizations.apply(pipe, f"cpu-bf16,{other}")
    assert pipe.optimizations == []


def test_refused_where_fp32_is_faster(make, monkeypatch):
    monkeypatch.setattr(dots, "fast", lambda: False)
    with pytest.raises(OptimizationError, match=r"needs a CPU with AMX or AVX512-BF16.*fp32 is faster here"):
        make("cpu-bf16")


def test_what_explain_says(make):
    text = str(make("cpu-bf16", "kv-cache").explain())
    assert "C++ bf16" in text
    assert f"C++: built for {native.instruction_set()}" in text
    assert "C++" not in str(make().explain())

"""Models with the Triton kernels against the plain ones, on the CPU under Triton's interpreter.

The interpreter must be chosen before Triton is imported, so the tests run in a process of their own, which the first
test here starts.
"""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from bench.reference.numbers import noise, relative_error
from bench.reference.weights import random_controlnet, tiny_config
from tests.sparing import sparing
from tests.weights import random_models

pytest.importorskip("triton", reason="fused kernels need Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_under_the_interpreter starts")


@pytest.mark.skipif(INTERPRETED, reason="is the process itself")
@pytest.mark.parametrize("which", sparing(["not full", "full"], lambda which: which == "not full"))
def test_under_the_interpreter(which):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", which, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# ---- whole models

# Two levels, and few groups: each is a program to interpret.
SMALL = tiny_config(
    unet={"norm_groups": 4, "channel_mult": (1, 2), "attention_levels": (0,)}, vae={"norm_groups": 4, "ch_mult": (1, 2)}
)
FUSED = ["fused-norm", "fused-layernorm", "fused-geglu", "fused-upsample"]


ALL = ["channels-last", "pointwise-linear", "packed-qkv", "kv-cache", "time-cache", *FUSED]


@interpreted
@pytest.mark.parametrize("names", sparing([*([name] for name in FUSED), ALL], lambda names: names == ALL), ids=",".join)
@torch.inference_mode()
def test_models(names):
    from sd import optimizations
    from sd.pipeline import StableDiffusion

    plain, fast = (StableDiffusion(SMALL, *random_models(SMALL)) for _ in range(2))
    optimizations.apply(fast, names)
    x, t, context, latents = noise(2, 4, 8, 8), torch.tensor(541), noise(2, 77, 64, seed=1), noise(1, 4, 2, 2)
    for inputs in ((x, t, context), (x[:1, :, :4], t, context[:1])):
        kept = [tensor.clone() for tensor in inputs]
        assert relative_error(fast.unet(*inputs), plain.unet(*inputs)) < 1e-5
        assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))
    assert relative_error(fast.vae.decode(latents), plain.vae.decode(latents)) < 1e-5
    assert list(fast.unet.state_dict()) == list(plain.unet.state_dict())


@interpreted
@torch.inference_mode()
def test_controlnets(tmp_path):
    from sd import optimizations
    from sd.pipeline import StableDiffusion

    save_file(random_controlnet(SMALL).state_dict(), path := tmp_path / "net.safetensors")
    plain, fast = (StableDiffusion(SMALL, *random_models(SMALL)) for _ in range(2))
    optimizations.apply(fast, [*ALL, "split-conv"])
    found = []
    for pipe in (plain, fast):
        net = pipe.controlnets.loaded[pipe.add_control(path)]
        hint = net.seen(noise(1, 3, 64, 64, seed=2)).repeat(2, 1, 1, 1)
        found.append(net(noise(2, 4, 8, 8), torch.tensor(541), noise(2, 77, 64, seed=1), hint))
    assert max(relative_error(a, b) for a, b in zip(*found, strict=True)) < 1e-5
    rows = [row for row in fast.explain().rows if row.module.startswith("control.")]
    assert {*FUSED[:-1], "split-conv"} <= {switch for row in rows for switch in row.switches}


@interpreted
@torch.inference_mode()
def test_models_with_products_of_their_own(monkeypatch):
    """As on a GPU at 512x512 in fp16: by the sizes of these models, cuBLAS and cuDNN would do all of it."""
    from sd import optimizations
    from sd.kernels import gpu_products
    from sd.optimizations.fused import FusedGEGLU, SplitConv
    from sd.pipeline import StableDiffusion

    called = []
    for name in ("geglu_product", "conv3x3_split"):
        kernel = getattr(gpu_products, name)
        record = lambda *given, name=name, kernel=kernel: (called.append(name), kernel(*given))[1]  # noqa: E731
        monkeypatch.setattr(gpu_products, name, record)
    plain, fast = (StableDiffusion(SMALL, *random_models(SMALL)) for _ in range(2))
    optimizations.apply(fast, [*ALL, "split-conv"])
    inputs = noise(2, 4, 8, 8), torch.tensor(541), noise(2, 77, 64, seed=1)
    assert relative_error(fast.unet(*inputs), plain.unet(*inputs)) < 1e-5
    assert not called
    monkeypatch.setattr(gpu_products, "geglu_pays", lambda x: True)
    monkeypatch.setattr(gpu_products, "conv_pays", lambda x: True)
    assert relative_error(fast.unet(*inputs), plain.unet(*inputs)) < 1e-5
    expected = {"geglu_product": FusedGEGLU, "conv3x3_split": SplitConv}
    for name, kind in expected.items():
        assert called.count(name) == sum(isinstance(m, kind) for m in fast.unet.modules()) > 0


@interpreted
@torch.inference_mode()
def test_models_whose_guidance_halves_share_what_precedes_the_text():
    from sd import optimizations
    from sd.pipeline import StableDiffusion

    plain, fast = (StableDiffusion(SMALL, *random_models(SMALL)) for _ in range(2))
    optimizations.apply(fast, ["channels-last", "pointwise-linear", "time-cache", *FUSED, "shared-halves"])
    x, t, context = torch.cat([noise(1, 4, 8, 8)] * 2), torch.tensor(541), noise(2, 77, 64, seed=1)
    with fast.call.halves(alike=True):
        assert relative_error(fast.unet(x, t, context), plain.unet(x, t, context)) < 1e-5


@interpreted
@torch.inference_mode()
def test_fused_blocks_call_the_convolutions_that_other_switches_put_there():
    """They used to compute 1x1 convolutions by themselves, and pointwise-linear was on in name alone."""
    from sd import optimizations
    from sd.optimizations.layout import PointwiseConv
    from sd.pipeline import StableDiffusion

    fast = StableDiffusion(SMALL, *random_models(SMALL))
    optimizations.apply(fast, ["pointwise-linear", *FUSED])
    convs = {name: m for name, m in fast.unet.named_modules() if isinstance(m, PointwiseConv)}
    used = set()
    for name, conv in convs.items():
        conv._product = lambda x, bias, name=name, conv=conv: (used.add(name), PointwiseConv._product(conv, x, bias))[1]
    fast.unet(noise(2, 4, 8, 8), torch.tensor(541), noise(2, 77, 64, seed=1))
    assert any("skip_connection" in name for name in convs)
    assert any("proj_in" in name for name in convs)
    assert used == set(convs)


@interpreted
@pytest.mark.parametrize("name", sparing([*FUSED, "split-conv"], lambda name: name == "fused-norm"))
def test_undo(name):
    from sd import optimizations
    from sd.pipeline import StableDiffusion

    pipe = StableDiffusion(SMALL, *random_models(SMALL))
    inputs = noise(2, 4, 8, 8), torch.tensor(541), noise(2, 77, 64, seed=1)
    before = [(type(m), set(vars(m))) for model in (pipe.unet, pipe.vae) for m in model.modules()]
    with torch.inference_mode():
        plain = pipe.unet(*inputs)
        optimizations.apply(pipe, name)
        fused = pipe.unet(*inputs)
        optimizations.undo(pipe)
        assert [(type(m), set(vars(m))) for model in (pipe.unet, pipe.vae) for m in model.modules()] == before
        assert torch.equal(pipe.unet(*inputs), plain)
        optimizations.apply(pipe, name)
        assert torch.equal(pipe.unet(*inputs), fused)


@interpreted
@pytest.mark.parametrize(
    ("fused", "other"), [("fused-norm", "cpu-norm"), ("fused-layernorm", "cpu-linear"), ("fused-geglu", "cpu-linear")]
)
def test_two_kernels_for_one_thing_are_refused_by_name(fused, other):
    from sd import optimizations
    from sd.pipeline import StableDiffusion

    pipe = StableDiffusion(SMALL, *random_models(SMALL))
    refusal = f"{fused} cannot be .* {other}|{other} cannot be .* {fused}"
    with pytest.raises(optimizations.OptimizationError, match=refusal):
        optimizations.apply(pipe, [fused, other])


@interpreted
@torch.inference_mode()
def test_explain_names_what_is_done_within_a_block():
    from sd import optimizations
    from sd.pipeline import StableDiffusion

    pipe = StableDiffusion(SMALL, *random_models(SMALL))
    optimizations.apply(pipe, FUSED)
    norm = next(row for row in pipe.explain().rows if row.module.endswith("in_layers.*") and row.switches)
    assert norm.kernel == "by the module around it"
    assert norm.switches == ("fused-norm",)

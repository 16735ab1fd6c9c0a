"""Models with the Triton kernels against the plain ones, on the CPU under Triton's interpreter.

The interpreter must be chosen before Triton is imported, so the tests run in a process of their own, which the first
test here starts.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from bench.reference.weights import random_models, tiny_config

pytest.importorskip("triton", reason="fused kernels need Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_under_the_interpreter starts")


@pytest.mark.skipif(INTERPRETED, reason="is the process itself")
def test_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    return ((out.double() - reference.double()).norm() / reference.double().norm()).item()


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- whole models

# Two levels, and few groups: each is a program to interpret.
SMALL = tiny_config(
    unet={"norm_groups": 4, "channel_mult": (1, 2), "attention_levels": (0,)}, vae={"norm_groups": 4, "ch_mult": (1, 2)}
)
FUSED = ["fused-norm", "fused-layernorm", "fused-geglu", "fused-upsample"]


@interpreted
@pytest.mark.parametrize(
    "names",
    [
        *([name] for name in FUSED),
        ["channels-last", "pointwise-linear", "packed-qkv", "kv-cache", "time-cache", *FUSED],
    ],
    ids=",".join,
)
@torch.inference_mode()
def test_models(names):
    from sd import optimize
    from sd.pipeline import StableDiffusion

    plain, fast = (StableDiffusion(SMALL, *random_models(SMALL)) for _ in range(2))
    optimize.apply(fast, names)
    x, t, context, latents = noise(2, 4, 8, 8), torch.tensor(541), noise(2, 77, 64, seed=1), noise(1, 4, 2, 2)
    for inputs in ((x, t, context), (x[:1, :, :4], t, context[:1])):
        kept = [tensor.clone() for tensor in inputs]
        assert error(fast.unet(*inputs), plain.unet(*inputs)) < 1e-5
        assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))
    assert error(fast.vae.decode(latents), plain.vae.decode(latents)) < 1e-5
    assert list(fast.unet.state_dict()) == list(plain.unet.state_dict())


@interpreted
@torch.inference_mode()
def test_models_whose_guidance_halves_share_what_precedes_the_text():
    from sd import optimize
    from sd.pipeline import StableDiffusion

    plain, fast = (StableDiffusion(SMALL, *random_models(SMALL)) for _ in range(2))
    optimize.apply(fast, ["channels-last", "pointwise-linear", "time-cache", *FUSED, "shared-halves"])
    x, t, context = torch.cat([noise(1, 4, 8, 8)] * 2), torch.tensor(541), noise(2, 77, 64, seed=1)
    fast.unet.halves.alike = True
    assert error(fast.unet(x, t, context), plain.unet(x, t, context)) < 1e-5

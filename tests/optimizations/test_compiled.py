"""torch.compile: the same pictures, and no recompilation for anything but another shape."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.reference.numbers import pixels
from bench.reference.weights import random_controlnet, random_models, tiny_config
from sd import optimizations
from sd.controlnet import Control
from sd.optimizations.compiled import compile_seconds
from tests.optimizations.support import fresh

ONE_LEVEL = tiny_config(
    unet={"channel_mult": (1,), "attention_levels": (0,)}, vae={"ch_mult": (1,)}, image_size=8, name="one level"
)  # 4 graphs to compile

HINT = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))

needs_a_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")


@pytest.mark.full
@needs_a_compiler
@pytest.mark.parametrize("name", ["compile", "compile=unet"])
def test_controlnets_are_compiled_too(tokenizer, tmp_path, monkeypatch, name):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    save_file(random_controlnet(ONE_LEVEL).state_dict(), path := tmp_path / "net.safetensors")
    models = random_models(ONE_LEVEL)
    fast, plain = (fresh(models, tokenizer, ONE_LEVEL) for _ in range(2))
    optimizations.apply(fast, [name, "kv-cache", "time-cache"])
    torch._dynamo.reset()
    draw = {"prompt": "a cat", "steps": 3, "seed": 1}
    for control in ([HINT], []):
        a, b = (
            pixels(pipe.generate(**draw, control=[Control(pipe.add_control(path), hint) for hint in control]))
            for pipe in (fast, plain)
        )
        assert np.abs(a - b).max() <= 1
    rows = [row for row in fast.explain().rows if row.module.startswith("control") and row.switches]
    assert any("compile" in row.switches for row in rows)


@pytest.mark.full
@needs_a_compiler
def test_compile(tokenizer, tmp_path, monkeypatch):
    """The same pictures; and once one is drawn, no graph break and no recompilation for anything but another shape."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    models = random_models(ONE_LEVEL)
    fast, plain = (fresh(models, tokenizer, ONE_LEVEL) for _ in range(2))
    optimizations.apply(fast, ["compile", "kv-cache", "time-cache", "packed-qkv"])
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    graphs_of_the_first = None
    for changes in ({}, {"seed": 9}, {"prompt": "a dog"}, {"cfg_scale": 2.0}, {"steps": 5}, {"sampler": "ddim"}):
        draw = {"prompt": "a cat", "steps": 3, "seed": 1, **changes}
        assert np.abs(pixels(fast.generate(**draw)) - pixels(plain.generate(**draw))).max() <= 1
        graphs_of_the_first = graphs_of_the_first or counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == graphs_of_the_first, changes
    assert not counters["graph_break"]
    assert fast.times["compile"] == 0
    assert compile_seconds() > 0
    assert list(fast.unet.state_dict()) == list(plain.unet.state_dict())

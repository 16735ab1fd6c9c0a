"""ControlNets beside every optimization: what goes through a switch is what goes through the plain UNet."""

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from bench.reference.numbers import pixels
from bench.reference.weights import random_controlnet
from sd import optimizations
from sd.controlnet import Control
from sd.optimizations import registry
from sd.pipeline import StableDiffusion
from tests.optimizations.stand_in import install
from tests.optimizations.support import DRAW, EXACT_ON_CPU
from tests.weights import SHALLOW

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
LONGER = {**DRAW, "steps": 6, "sampler": "ddim"}


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("controls") / "net.safetensors"
    save_file(random_controlnet(SHALLOW, seed=5).state_dict(), path)
    return path


def drawn(pipe: StableDiffusion, net, *numbers: float, prompt: str = "a cat", picture=PICTURE, **changes) -> np.ndarray:
    control = [Control(pipe.add_control(net), picture, *numbers)]
    return pixels(pipe.generate(prompt, **{**LONGER, **changes}, control=control))


def apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a - b).max())


@pytest.mark.parametrize("name", EXACT_ON_CPU)
def test_exact_switches_draw_the_plain_picture(make, net, name):
    plain = make()
    expected = drawn(plain, net, 0.8, 0.0, 0.5)
    assert apart(expected, pixels(plain.generate("a cat", **LONGER))) > 8, "the control changes the picture"
    assert apart(expected, drawn(plain, net, 0.8, 0.0, 0.5, picture=PICTURE.rotate(90))) > 8, "it sees its picture"
    assert apart(drawn(make(name), net, 0.8, 0.0, 0.5), expected) <= 1


@pytest.mark.parametrize("names", ["exact", "cpu"])
def test_presets_draw_the_plain_picture(make, net, names):
    assert apart(drawn(make(names), net), drawn(make(), net)) <= 1


@pytest.mark.parametrize("name", ["cuda-graph", "loop-graph", "cuda-graph,deepcache=2", "loop-graph,deepcache=2"])
def test_captured_graphs_see_controls(make, net, monkeypatch, name):
    """Another picture, weight, part of the steps and prompt, and none: each as without a graph."""
    install(monkeypatch)
    pipe, plain = make(*name.split(",")), make(*name.split(",")[1:])
    other = PICTURE.rotate(90)
    for numbers, changes in (
        ((), {}),
        ((), {"picture": other}),
        ((0.5,), {"picture": other}),
        ((1.0, 0.0, 0.5), {}),
        ((1.0, 0.5, 1.0), {}),
        ((), {"prompt": "a dog"}),
        ((), {}),
    ):
        assert apart(drawn(pipe, net, *numbers, **changes), drawn(plain, net, *numbers, **changes)) <= 1, numbers
    assert apart(pixels(pipe.generate("a cat", **LONGER)), pixels(plain.generate("a cat", **LONGER))) <= 1


@pytest.mark.parametrize("name", ["deepcache=1", "tgate=6", "guidance-interval=0.0-1.0"])
def test_approximate_switches_that_save_nothing_draw_the_plain_picture(make, net, name):
    assert apart(drawn(make(name), net), drawn(make(), net)) <= 1


NEAR = dict.fromkeys(("deepcache=2", "tgate=3", "guidance-interval=0.0-0.5", "token-merging=0.5"), (0.0, 1.0))
LATE = dict.fromkeys(("tgate=3", "guidance-interval=0.0-0.5"), (0.5, 1.0))  # where they run half a batch


@pytest.mark.parametrize(("name", "part"), [*NEAR.items(), *LATE.items()])
def test_approximate_switches_stay_near_and_see_the_control(make, net, name, part):
    """Nearer to the plain picture with the control than to their own without it."""
    pipe = make(name)
    with_control, without = drawn(pipe, net, 1.0, *part), pixels(pipe.generate("a cat", **LONGER))
    plain = drawn(make(), net, 1.0, *part)
    assert np.abs(with_control - plain).mean() < np.abs(without - plain).mean() / 2


def test_every_switch_that_saves_work_is_tested_here():
    """One that wraps or stages the UNet must pass residuals on."""
    approximate = {name for name, one in registry.catalog().items() if not one.exact}
    known = {"deepcache", "tgate", "guidance-interval", "token-merging", "vae-tiling"}
    assert {n for n in approximate if not n.startswith(("cpu-", "int8", "fp16", "bf16", "float8"))} == known


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_it_follows_the_pipelines_dtype_and_back(loaded, net, name):
    pipe = loaded()
    expected = drawn(pipe, net)
    optimizations.apply(pipe, name)
    assert np.abs(drawn(pipe, net) - expected).mean() < 6
    optimizations.undo(pipe)
    assert np.array_equal(drawn(pipe, net), expected)

"""ControlNets beside every optimization: what goes through a switch is what goes through the plain UNet."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.reference.numbers import noise, pixels, relative_error
from bench.reference.weights import random_controlnet
from sd import optimizations
from sd.controlnet import Control, ControlNet
from sd.optimizations import OptimizationError, onednn, registry, winograd
from sd.pipeline import StableDiffusion
from tests.optimizations.stand_in import install
from tests.optimizations.support import DRAW, EXACT_ON_CPU, change_in_place, inputs
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


GRAPHS = ("cuda-graph", "loop-graph")
CACHES = "kv-cache,packed-qkv,time-cache,shared-halves"


@pytest.mark.parametrize("name", [f"{graph}{more}" for graph in GRAPHS for more in ("", ",deepcache=2", f",{CACHES}")])
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


@pytest.mark.parametrize(
    "names", ["kv-cache,tgate=3", "kv-cache,packed-qkv,tgate=3", "kv-cache,guidance-interval=0.0-0.5"]
)
def test_half_a_batch_reads_the_text_of_its_prompt(make, net, names):
    """Keys and values of the text are kept for that half too, and made anew for another prompt."""
    pipe, alone = make(*names.split(",")), make(names.split(",")[-1])
    for prompt, strength in (("a cat", 1.0), ("two dogs", 8.0)):
        assert apart(drawn(pipe, net, strength, prompt=prompt), drawn(alone, net, strength, prompt=prompt)) <= 1
        drawn(pipe, net, cfg_scale=1.0, prompt="a dog")


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


# ---- the network itself


def of(pipe: StableDiffusion, net) -> ControlNet:
    return pipe.controlnets.loaded[pipe.add_control(net)]


@torch.inference_mode()
def found(network: ControlNet, **given) -> torch.Tensor:
    """All that it finds, as one row."""
    x, t, context = inputs(**given)
    hint = network.seen(noise(1, 3, 64, 64, seed=8).sigmoid())
    return torch.cat([each.flatten() for each in network(x, t, context, hint.repeat(len(x), 1, 1, 1))])


@pytest.mark.parametrize("name", EXACT_ON_CPU)
def test_it_finds_the_same(make, net, name):
    fast, plain = of(make(name), net), of(make(), net)
    for given in ({}, {"t": 21, "seed": 5}, {"batch": 1}):
        assert relative_error(found(fast, **given), found(plain, **given)) < 1e-5


VALUES = {"deepcache": "deepcache=2", "guidance-interval": "guidance-interval=0.0-0.5", "tgate": "tgate=2"}
NOT_HERE = ("float8", "compile", "split-conv", *(name for name in registry.catalog() if name.startswith("fused")))
HERE = [VALUES.get(name, name) for name in registry.catalog() if name not in NOT_HERE]
OWN = ("int8-static", "cpu-int8", "tgate", "deepcache")  # which do something else to it
BOTH = ("input_blocks", "middle_block", "time_embed")


def runs(model: torch.nn.Module) -> dict:
    """Of what a UNet and a ControlNet both have: classes, own attributes, the weights' types."""
    modules = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    weights = {name: (type(w), w.dtype, w.stride()) for name, w in model.named_parameters()}
    return {name: one for name, one in (modules | weights).items() if name.split(".")[0] in BOTH}


@pytest.mark.parametrize("name", HERE)
def test_what_is_done_to_the_unet_is_done_to_it(loaded, net, monkeypatch, as_if_there_were_amx, name):
    """Class by class, whether the ControlNet comes before or after, and taken back as if nothing had been."""
    install(monkeypatch)
    monkeypatch.setattr(onednn, "MIN_WEIGHTS", 0)
    before, after, plain = loaded(), loaded(name), loaded()
    expected, first = found(of(plain, net)), of(before, net)
    optimizations.apply(before, name)
    drawn(before, net)
    drawn(after, net)
    assert runs(of(before, net)) == runs(of(after, net))
    if name.split("=")[0] not in OWN:
        assert runs(of(after, net)) == runs(after.unet)
        assert ("forward" in vars(of(after, net))) == ("forward" in vars(after.unet)), "predict is wrapped"
    if before.dtype == torch.float32:
        assert of(before, net) is first, "it was not read twice"
    optimizations.undo(before)
    drawn(before, net)
    assert runs(of(before, net)) == runs(of(plain, net))
    assert torch.equal(found(of(before, net)), expected)
    assert not of(before, net)._forward_pre_hooks


def test_one_that_is_taken_away_is_gone(make, net):
    pipe = make("cpu")
    drawn(pipe, net)
    gone = weakref.ref(of(pipe, net))
    pipe.remove_controls()
    gc.collect()
    assert gone() is None
    assert apart(drawn(pipe, net), drawn(make(), net)) <= 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["winograd", "packed-qkv", "kv-cache", "time-cache", "cpu"])
def test_weights_that_are_written_to_are_seen(make, net, name):
    fast, plain = of(make(name), net), of(make(), net)
    before = found(fast)
    for each in (fast, plain):
        change_in_place(each)
    assert relative_error(found(fast), found(plain)) < 1e-5
    assert relative_error(found(fast), before) > 1e-3


def test_each_of_two_has_its_own(make, net, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file(random_controlnet(SHALLOW, seed=6).state_dict(), other)
    fast, plain = make("cpu", "time-cache", "packed-qkv"), make()
    for path in (net, other, net):
        assert relative_error(found(of(fast, path)), found(of(plain, path))) < 1e-5


def test_captured_graphs_are_used(make, net, monkeypatch):
    """One of the ControlNet and one of the UNet, and both are replayed at each step."""
    graphs = install(monkeypatch)
    pipe = make("cuda-graph")
    drawn(pipe, net)
    captured, replays = len(graphs.captured), graphs.replays
    drawn(pipe, net, prompt="a dog")
    assert len(graphs.captured) == captured
    assert graphs.replays - replays >= 2 * LONGER["steps"]


@torch.inference_mode()
def test_what_a_graph_has_found_is_the_callers_own(make, net, monkeypatch):
    install(monkeypatch)
    network = of(make("cuda-graph"), net)
    hint = network.seen(noise(1, 3, 64, 64)).repeat(2, 1, 1, 1)
    first = network(*inputs(), hint)
    kept = [each.clone() for each in first]
    network(*inputs(seed=5), hint)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def calls_of(module: torch.nn.Module) -> list[int]:
    """Of its calls from now on, how large the batch is."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    return calls


@pytest.mark.parametrize(
    ("name", "first", "middle"),
    [
        ("deepcache=2", [2] * 4, [2, 2]),
        ("guidance-interval=0.0-0.5", [2, 2, 1, 1], [2, 2, 1, 1]),
        ("tgate=3", [2, 2, 2, 1], [2, 2, 2, 1]),
        ("tgate=3,deepcache=2", [2, 2, 2, 1], [2, 2, 1]),
        ("guidance-interval=0.0-0.5,deepcache=3", [2, 2, 1, 1], [2, 1, 1]),
    ],
)
def test_work_that_the_unet_is_spared_it_is_spared_too(make, net, name, first, middle):
    pipe = make(*name.split(","))
    network = of(pipe, net)
    calls = [calls_of(network.input_blocks[0][0]), calls_of(network.middle_block)]
    drawn(pipe, net, steps=4)
    assert calls == [first, middle]


def test_halves_are_shared(make, net):
    pipe = make("shared-halves")
    block = of(pipe, net).input_blocks[1]
    calls = [calls_of(layer) for layer in (block[0].in_layers, block[1].transformer_blocks[0].attn2)]
    drawn(pipe, net, steps=2)
    assert calls == [[1, 1], [2, 2]]


def test_deepcache_takes_from_it_what_counts(make, net):
    """In between as with all that it finds."""
    pipe, whole = make("deepcache=2"), make("deepcache=2")
    of(whole, net).__class__ = ControlNet
    assert np.array_equal(drawn(pipe, net), drawn(whole, net))


@pytest.mark.parametrize("name", ["int8-weights", "int8-static", "cpu-bf16", "cpu-int8"])
def test_quantized_it_is_near(loaded, net, as_if_there_were_amx, name):
    short, plain = of(loaded(name), net), of(loaded(), net)
    error = relative_error(found(short), found(plain))
    assert error == 0 if name == "int8-static" else 1e-5 < error < 3e-2


def test_what_is_not_done_to_it_is_told(loaded, net, caplog):
    with caplog.at_level("INFO"):
        of(loaded("int8-static"), net)
    assert "int8-static leaves a ControlNet as it is: its ranges are found without a control" in caplog.text


def test_explain_names_it(make, net):
    pipe = make("winograd", "kv-cache")
    of(pipe, net)
    rows = [row for row in pipe.explain().rows if row.module.startswith("control.")]
    assert {"winograd", "kv-cache"} <= {switch for row in rows for switch in row.switches}
    assert any(row.module.startswith("control.zero_convs") for row in rows)
    optimizations.undo(pipe)
    drawn(pipe, net)
    assert not any(row.switches for row in pipe.explain().rows)


def test_a_switch_that_fails_on_it_is_taken_back_everywhere(make, net, monkeypatch):
    pipe = make()
    of(pipe, net)
    expected = drawn(pipe, net)

    def fails(patch):
        raise OptimizationError("kv-cache: no")

    catalog = dict(registry.catalog())
    catalog["kv-cache"] = dataclasses.replace(catalog["kv-cache"], beside=fails)
    monkeypatch.setattr(registry, "catalog", lambda: catalog)
    with pytest.raises(OptimizationError, match="kv-cache: no"):
        optimizations.apply(pipe, ["cpu-linear", "kv-cache"])
    assert pipe.optimizations == []
    assert np.array_equal(drawn(pipe, net), expected)
    assert runs(of(pipe, net)) == runs(of(make(), net))


def test_memory_for_kernels_is_shared_out(make, net, monkeypatch):
    """A ControlNet's kernels may take as much of it as the ControlNet is large."""
    budgets: list[int] = []
    plan = winograd.plan
    monkeypatch.setattr(
        winograd, "plan", lambda uses, budget, rates: (budgets.append(budget), plan(uses, budget, rates))[1]
    )
    pipe = make("winograd=2.0")
    sizes = [sum(p.numel() for p in model.parameters()) for model in (pipe.unet, of(pipe, net))]
    assert budgets[0] == 2e9
    assert budgets[1] / budgets[0] == pytest.approx(sizes[1] / sizes[0])

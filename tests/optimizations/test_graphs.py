"""CUDA graphs on a CPU, by a stand-in that replays operations: keys, recaptures, changed weights and prompts."""

import numpy as np
import pytest
import torch

from bench.reference.numbers import noise, pixels, relative_error
from sd.noise import PictureNoise
from sd.optimizations import OptimizationError, graphs, registry
from sd.samplers import SAMPLERS, choose
from sd.schedules import leading
from tests.optimizations.stand_in import install
from tests.optimizations.support import CPU, DRAW, change_in_place, inputs, load, replace
from tests.sparing import sparing

CACHES = ("kv-cache", "time-cache", "packed-qkv")


@pytest.fixture
def captured(monkeypatch):
    return install(monkeypatch)


def assert_draws_alike(fast, plain, **changes) -> None:
    draw = {"prompt": "a cat", **DRAW, **changes}
    assert np.abs(pixels(fast.generate(**draw)) - pixels(plain.generate(**draw))).max() <= 1, changes


def test_what_a_picture_has_captured_is_called_in_any_mode(make, captured):
    """A graph's inputs are written to: also outside of the inference mode in which a picture captured it."""
    pipe, plain = make("cuda-graph"), make()
    assert_draws_alike(pipe, plain)
    latents = noise(1, pipe.config.vae.z_channels, 2, 2)
    with torch.no_grad():
        assert relative_error(pipe.vae.decode(latents), plain.vae.decode(latents)) < 1e-6
        ids = pipe.tokenizer(["a cat", ""], pipe.config.text.max_length)
        assert relative_error(pipe.clip(ids), plain.clip(ids)) < 1e-6


# ---- one call as a graph


@torch.no_grad()
def test_a_graph_is_captured_once_a_shape_and_replayed(make, captured):
    pipe, plain = make("cuda-graph"), make()
    for batch, side in ((2, 8), (2, 8), (1, 8), (2, 16), (2, 8)):
        given = inputs(batch, side, seed=batch + side)
        assert relative_error(pipe.unet(*given), plain.unet(*given)) < 1e-6
    assert len(captured.captured) == 3
    assert captured.replays == 5
    assert min(len(graph.operations) for graph in captured.captured) > 100


@torch.no_grad()
def test_a_replay_reads_its_inputs_and_gives_away_its_output(make, captured):
    pipe, plain = make("cuda-graph"), make()
    first = pipe.unet(*inputs())
    kept = first.clone()
    other = pipe.unet(*inputs(seed=5, t=21))
    assert torch.equal(first, kept)
    assert relative_error(other, plain.unet(*inputs(seed=5, t=21))) < 1e-6
    assert len(captured.captured) == 1


@torch.no_grad()
@pytest.mark.parametrize("names", [(), CACHES], ids=str)
def test_a_graph_sees_weights_written_to_and_is_captured_again_when_they_move(make, captured, names):
    pipe, plain = make("cuda-graph", *names), make()
    given = inputs()
    for change, captures in ((change_in_place, 1), (load, 1), (replace, 2), (change_in_place, 2)):
        assert relative_error(pipe.unet(*given), plain.unet(*given)) < 1e-5
        change(pipe.unet)
        change(plain.unet)
        assert relative_error(pipe.unet(*given), plain.unet(*given)) < 1e-5
        assert len(captured.captured) == captures, change.__name__


def test_text_unet_and_decoder_are_graphs_and_prompts_are_seen(make, captured):
    pipe, plain = make("cuda-graph", *CACHES), make()
    for prompt in ("a cat", "a dog", "a cat"):
        assert_draws_alike(pipe, plain, prompt=prompt)
    assert len(captured.captured) == 3
    assert captured.replays == 3 * (1 + DRAW["steps"] + 1)


def test_graphs_are_limited_in_number(make, captured):
    pipe = make()
    graphed = graphs.Graphed(lambda x: x + 1, pipe.unet)
    for size in range(1, 2 * graphs.MAX_GRAPHS):
        assert graphed(torch.zeros(size)).sum() == size
    assert len(graphed.recordings.kept) == graphs.MAX_GRAPHS


# ---- what a graph must tell apart


@pytest.mark.parametrize(
    ("names", "captures"),
    [(["deepcache=2"], 2), (["shared-halves"], 1), (["guidance-interval=0.0-0.5"], 2), (["deepcache=2", *CACHES], 2)],
    ids=str,
)
def test_a_graph_depends_on_where_in_the_picture_it_is(make, captured, names, captures):
    pipe, plain = make("cuda-graph", *names), make(*names)
    assert_draws_alike(pipe, plain)
    assert_draws_alike(pipe, plain, prompt="a dog", seed=8)
    of_text_and_decoder = 2
    assert len(captured.captured) == captures + of_text_and_decoder


def test_a_graph_with_shared_halves_tells_guided_calls_from_others(make, captured):
    """A picture with guidance and two without have inputs of the same shape."""
    pipe, plain = make("cuda-graph", "shared-halves"), make()
    for prompt, scale in (("a cat", 7.5), (["a cat", "a dog"], 1), ("a cat", 7.5)):
        assert_draws_alike(pipe, plain, prompt=prompt, cfg_scale=scale)


def test_graphs_of_deepcache_read_what_the_step_before_has_left_whichever_graph_that_was(make, captured):
    """Inputs of one shape, features by two graphs; and those that are read were captured last by the wrong one."""
    names = "deepcache=2", "shared-halves"
    pipe, plain = make("cuda-graph", *names), make(*names)
    two = {"prompt": ["a cat", "a dog"], "cfg_scale": 1}
    for changes in ({**two, "steps": 1}, {}, two, {}, two):
        assert_draws_alike(pipe, plain, **changes)


def test_a_graph_that_is_told_nothing_would_draw_another_picture(make, captured, monkeypatch):
    """The stand-in is strict: without the key of deepcache, the first step's graph would run at every step."""
    pipe, plain = make("cuda-graph", "deepcache=2"), make("deepcache=2")
    monkeypatch.setattr(pipe.record.patches[0], "keys", [])
    a, b = (pixels(p.generate("a cat", **DRAW)) for p in (pipe, plain))
    assert np.abs(a - b).max() > 1


# ---- the whole loop

LOOPS = (
    {},
    {"seed": 9},
    {"prompt": "a dog"},
    {"sampler": "ddim"},
    {"sampler": "heun", "schedule": "karras"},
    {"sampler": "unipc", "solver_order": 3},
    {"steps": 3},
    {"cfg_scale": 1},
    {"cfg_scale": 2.0},
    {"negative_prompt": "a dog"},
    {},
)


LOOPED = [[*CACHES, "guidance-interval=0.0-0.5"], [], ["deepcache=2"], ["async-noise"]]


@pytest.mark.parametrize("names", sparing(LOOPED, lambda names: names == LOOPED[0]), ids=str)
def test_loop_graph(make, captured, names):
    """One capture serves every prompt and seed; sampler, steps, scale and shape need their own."""
    pipe, plain = make("loop-graph", *names), make(*names)
    for changes in LOOPS:
        assert_draws_alike(pipe, plain, **changes)
    of_text = 2  # with guidance and without
    assert len(captured.captured) == 7 + of_text + 1


def test_loop_graph_reports_all_steps_at_the_end(make, captured):
    pipe, plain = make("loop-graph"), make()
    seen: dict[str, list] = {"loop": [], "plain": []}
    for p, key in ((pipe, "loop"), (plain, "plain")):
        p.generate("a cat", **DRAW, on_step=lambda i, n, x, key=key: seen[key].append((i, n, x.clone())))
    assert [s[:2] for s in seen["loop"]] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(relative_error(a[2], b[2]) < 1e-6 for a, b in zip(seen["loop"], seen["plain"], strict=True))


@torch.no_grad()
def test_loop_graph_sees_changed_weights(make, captured):
    pipe, plain = make("loop-graph", *CACHES), make()
    assert_draws_alike(pipe, plain)
    for change in (change_in_place, replace):
        change(pipe.unet)
        change(plain.unet)
        assert_draws_alike(pipe, plain)


def every_sampler(names: list[str]) -> list:
    cases = [(name, sampler) for name in names for sampler in SAMPLERS]
    return sparing(cases, lambda case: case in (("loop-graph", "dpmpp_sde"), ("cuda-graph", "dpm2")))


@pytest.mark.parametrize(("graph", "sampler"), every_sampler(["cuda-graph", "loop-graph", "deepcache=1"]))
def test_every_sampler_by_graphs(make, captured, graph, sampler):
    """With history, with two calls a step, with noise drawn before the loop; and levels between whole timesteps."""
    pipe, plain = make(graph, *CACHES), make()
    for schedule in (None, "karras"):
        assert_draws_alike(pipe, plain, sampler=sampler, schedule=schedule)
        assert_draws_alike(pipe, plain, sampler=sampler, schedule=schedule, seed=8)


# ---- noise


def picture_noise(seed: int = 0) -> PictureNoise:
    return PictureNoise([seed, seed + 1], (4, 8, 8), CPU, torch.float32)


def test_async_noise_is_the_same_noise():
    plain, other, at_once = picture_noise(), graphs.AsyncNoise(picture_noise()), graphs.AsyncNoise(picture_noise())
    expected = torch.stack([plain() for _ in range(3)])
    assert torch.equal(torch.stack([other() for _ in range(3)]), expected)
    assert torch.equal(at_once.draw(3, expected[0]), expected)
    assert at_once.draw(0, expected[0]).shape == (0, 2, 4, 8, 8)


def test_async_noise_draws_the_same_pictures(make):
    for sampler in ("ddpm", "ddim"):
        assert_draws_alike(make("async-noise"), make(), sampler=sampler)


@pytest.mark.parametrize(("sampler", "draws"), [("ddpm", 5), ("ddim", 0), ("dpmpp_sde", 8), ("euler_a", 4)])
def test_count_draws(sampler, draws):
    assert graphs.count_draws(choose(sampler), leading(5)) == draws


# ---- the stand-in itself


def test_the_stand_in_replays_into_the_same_memory(captured):
    x, w = noise(3, 4), noise(4, 4, seed=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x @ w).reshape(-1)[2:].mul_(2)
        z = torch.cat([y, y]).sum()
    before = y.data_ptr()
    x.copy_(noise(3, 4, seed=2))
    w.mul_(3)
    graph.replay()
    assert y.data_ptr() == before
    expected = (x @ w).reshape(-1)[2:] * 2
    assert torch.allclose(y, expected)
    assert torch.allclose(z, 2 * expected.sum())


@pytest.mark.parametrize("call", [lambda x: x.sum().item(), lambda x: torch.tensor([1.0]), lambda x: torch.randn(2)])
def test_the_stand_in_refuses_what_a_capture_refuses(captured, call):
    x = noise(3)
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        call(x)


# ---- what cannot be captured


@pytest.mark.parametrize("graph", ["cuda-graph", "loop-graph"])
def test_layers_that_wait_for_the_gpu_are_refused_by_name(make, captured, monkeypatch, graph):
    """torchao prints each input of an int8-dynamic layer, which on a GPU cannot be recorded."""
    with pytest.raises(OptimizationError, match=f"{graph} cannot be combined with int8-dynamic, unless with compile"):
        make("int8-dynamic", graph)
    presets = {**registry.PRESETS, "mine": lambda pipe: (graph, "kv-cache")}
    monkeypatch.setattr(registry, "PRESETS", presets)
    assert make("int8-dynamic", "mine").optimizations == ["int8-dynamic", "kv-cache"]

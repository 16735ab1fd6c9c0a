"""Optimizations on small models: exact ones change nothing, caches notice what changes, wrong choices are refused."""

import itertools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.reference.weights import TINY, random_models, tiny_config
from sd import cache, graphs, onednn, optimize, tiling
from sd.attention import Chip, backend_for
from sd.ddpm import spaced_timesteps
from sd.models import build
from sd.optimize import REGISTRY, OptimizationError
from sd.pipeline import StableDiffusion
from sd.samplers import PictureNoise
from sd.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
KERNELS = ("winograd", "cpu-linear", "cpu-attention", "cpu-norm")
EXACT_ON_CPU = (
    *KERNELS,
    "page-out",
    "attention",
    "channels-last",
    "pointwise-linear",
    "packed-qkv",
    "kv-cache",
    "time-cache",
    "shared-halves",
    "async-noise",
)
DRAW = {"steps": 4, "height": 64, "width": 64, "seed": 3}


@pytest.fixture(scope="module")
def models():
    return random_models(TINY)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


@pytest.fixture
def make(models, tokenizer):
    """make("kv-cache", ...) -> a pipeline of its own weights with these optimizations."""

    def make(*names: str) -> StableDiffusion:
        pipe = StableDiffusion(TINY, *map(fresh, build(TINY), models), tokenizer=tokenizer)
        optimize.apply(pipe, names)
        return pipe

    return make


def fresh(model: nn.Module, source: nn.Module) -> nn.Module:
    """model, an empty one, with a copy of source's weights."""
    model.load_state_dict({name: tensor.clone() for name, tensor in source.state_dict().items()}, assign=True)
    return model.eval().requires_grad_(False)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(batch: int = 2, side: int = 8, t: int = 541, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return noise(batch, 4, side, side, seed=seed), torch.tensor(t), noise(batch, 77, 64, seed=seed + 1)


def error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    return ((out.double() - reference.double()).norm() / reference.double().norm()).item()


def pixels(images: Sequence) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


# ---- reading and refusing


def test_parse_orders_as_the_registry_does():
    assert optimize.parse("kv-cache, channels-last,attention", CPU) == ["attention", "channels-last", "kv-cache"]


def test_parse_expands_presets_and_the_last_value_counts():
    assert optimize.parse("none", CPU) == []
    assert optimize.parse("original", CPU) == ["attention", "int8-weights"]
    names = optimize.parse("fast,deepcache=5", CPU)
    assert [n for n in names if n.startswith("deepcache")] == ["deepcache=5"]
    assert set(optimize.parse("exact", CPU)) < set(optimize.parse("fast", CPU)) | {"deepcache=3"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("preset", optimize.PRESETS)
def test_presets_name_what_there_is(preset, device):
    for name in optimize.parse(preset, device):
        assert REGISTRY[name.partition("=")[0]].exact or preset not in ("none", "exact")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kvcache", "is it 'kv-cache'?"),
        ("zzz", "see --list-opts"),
        ("kv-cache=3", "takes no value"),
        ("deepcache=0", "a whole number from 1 on"),
        ("deepcache=x", "a whole number from 1 on"),
        ("guidance-interval=0.6-0.2", "two fractions"),
        ("guidance-interval=0-nan", "two fractions"),
        ("attention=fast", "auto, naive"),
        ("compile=all", "blocks, unet"),
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(OptimizationError, match=message):
        optimize.parse(text, CPU)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cuda-graph"], "cuda-graph needs an NVIDIA GPU; this is cpu in float32"),
        (["fused-norm"], "needs an NVIDIA GPU with sm80 or newer"),
        (["float8"], "needs an NVIDIA GPU with sm89"),
        (["naive", "attention"], "naive and attention cannot be combined"),
        (["packed-qkv", "int8-weights"], "int8-weights and packed-qkv cannot be combined"),
        (["attention=efficient"], "clip.encoder.layers.0.self_attn, whose head size is 64"),
    ],
)
def test_apply_refuses(make, names, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(OptimizationError, match=message):
        make(*names)


def test_apply_once_a_pipeline(make):
    pipe = make("kv-cache")
    with pytest.raises(OptimizationError, match="optimized already: kv-cache"):
        optimize.apply(pipe, ["time-cache"])


def test_apply_returns_what_it_applied_in_order(make):
    assert make("deepcache=2", "channels-last").optimizations == ["channels-last", "deepcache=2"]


def test_conflicts_name_optimizations():
    assert {other for o in REGISTRY.values() for other in o.conflicts} <= set(REGISTRY)
    assert {o.needs for o in REGISTRY.values()} <= set(optimize.NEEDS)


def test_docstrings_tell_what_to_expect():
    for name, entry in REGISTRY.items():
        text = entry.apply.__doc__
        if text is not None:  # quantization's are in sd/quantize.py
            assert ("Exact" in text) == entry.exact, name
            assert name == "naive" or ("Helps:" in text and "Hurts:" in text), name


def test_the_import_is_light():
    code = "import sys, sd.optimize; print(sorted({'triton', 'torchao', 'torch._inductor'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


# ---- exact ones change nothing


def assert_same(fast: StableDiffusion, plain: StableDiffusion, bound: float) -> None:
    for batch, side, t in ((2, 8, 541), (1, 8, 1), (2, 16, 981), (2, 8, 21)):
        given = inputs(batch, side, t)
        kept = [tensor.clone() for tensor in given]
        assert error(fast.unet(*given), plain.unet(*given)) <= bound
        assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
    latents, tokens = noise(1, 4, 8, 8), torch.arange(154).view(2, 77)
    assert error(fast.vae.decode(latents), plain.vae.decode(latents)) <= bound
    assert error(fast.clip(tokens), plain.clip(tokens)) <= bound
    for a, b in ((fast.unet, plain.unet), (fast.vae, plain.vae), (fast.clip, plain.clip)):
        assert list(a.state_dict()) == list(b.state_dict())
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@torch.inference_mode()
def test_none_is_the_plain_pipeline_to_the_bit(make, models):
    pipe = make()
    assert_same(pipe, StableDiffusion(TINY, *models), 0)
    assert [type(m) for m in pipe.unet.modules()] == [type(m) for m in models[1].modules()]
    assert not {"sample", "decode", "generate"} & set(vars(pipe))


@pytest.mark.parametrize("name", [*EXACT_ON_CPU, "naive", "attention=math", "attention=flash+math", "deepcache=1"])
@torch.inference_mode()
def test_alone(make, name):
    assert_same(make(name), make(), 1e-5)


@pytest.mark.parametrize("pair", itertools.combinations((*EXACT_ON_CPU, "deepcache=1"), 2), ids=",".join)
@torch.inference_mode()
@pytest.mark.full(memory=False)
def test_pairs(make, pair):
    given = inputs()
    assert error(make(*pair).unet(*given), make().unet(*given)) < 1e-5


@torch.inference_mode()
def test_all_at_once(make):
    everything = (*EXACT_ON_CPU, "deepcache=1", "guidance-interval=0.0-1.0", "vae-tiling=64")
    fast, plain = make(*everything), make()
    assert_same(fast, plain, 1e-5)
    for sampler in ("ddpm", "ddim"):
        a, b = (pixels(pipe.generate(["a cat", "a dog"], sampler=sampler, **DRAW)) for pipe in (fast, plain))
        assert np.abs(a - b).max() <= 1


@torch.inference_mode()
def test_work_outside_of_inference_mode_and_after_it(make):
    fast, plain, given = make(*EXACT_ON_CPU), make(), inputs()
    fast.unet(*given)
    with torch.inference_mode(False), torch.no_grad():
        other = inputs(seed=5)
        assert error(fast.unet(*other), plain.unet(*other)) < 1e-5


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@torch.inference_mode()
def test_dtypes(make, name):
    pipe, dtype = make(name), {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
    assert pipe.dtype == dtype
    assert all(p.dtype == dtype for m in (pipe.clip, pipe.unet, pipe.vae) for p in m.parameters())
    assert pipe.generate("a cat", **DRAW)


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_says_when_the_cpu_lacks_it(make, monkeypatch, caplog, supported):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    make("bf16")
    assert ("10 times slower" in caplog.text) is not supported


# ---- weights that change


def change_in_place(unet: nn.Module) -> None:
    for parameter in unet.parameters():
        parameter.mul_(1.1)


def replace(unet: nn.Module) -> None:
    unet.load_state_dict({name: 1.1 * tensor for name, tensor in unet.state_dict().items()}, assign=True)


def load(unet: nn.Module) -> None:
    unet.load_state_dict({name: 1.1 * tensor for name, tensor in unet.state_dict().items()})


@pytest.mark.parametrize("change", [change_in_place, replace, load])
@pytest.mark.parametrize("names", [["packed-qkv"], ["kv-cache"], ["time-cache"], EXACT_ON_CPU], ids=",".join)
@torch.no_grad()
def test_changed_weights_are_seen(make, names, change):
    fast, plain, given = make(*names), make(), inputs()
    before = fast.unet(*given)
    change(fast.unet)
    change(plain.unet)
    assert error(fast.unet(*given), plain.unet(*given)) < 1e-5
    assert error(fast.unet(*given), before) > 1e-3


@torch.no_grad()
def test_packed_projections_take_no_memory(make):
    unet = make("packed-qkv").unet
    attention = unet.middle_block[1].transformer_blocks[0].attn1
    assert attention.to_k.weight.untyped_storage().data_ptr() == attention.packed.weight.untyped_storage().data_ptr()
    assert attention.to_q.weight.data_ptr() == attention.packed.weight.data_ptr()


# ---- the text's keys and values


def count_calls(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@torch.inference_mode()
def test_kv_cache_computes_once_a_prompt(make):
    fast, plain = make("kv-cache"), make()
    calls = count_calls(fast.unet.middle_block[1].transformer_blocks[0].attn2.to_k)
    x, t, context = inputs()
    for _ in range(3):
        fast.unet(x, t, context)
    assert len(calls) == 1
    for seed in (7, 8, 7):
        other = noise(2, 77, 64, seed=seed)
        assert error(fast.unet(x, t, other), plain.unet(x, t, other)) < 1e-5
    assert len(calls) == 4


@torch.no_grad()
def test_kv_cache_sees_a_context_written_to(make):
    fast, plain = make("kv-cache"), make()
    x, t, context = inputs()
    fast.unet(x, t, context)
    context.mul_(2)
    assert error(fast.unet(x, t, context), plain.unet(x, t, context)) < 1e-5


@torch.inference_mode()
def test_kv_cache_keeps_its_memory_in_place(make):
    pipe = make("kv-cache")
    attention = pipe.unet.middle_block[1].transformer_blocks[0].attn2
    x, t, context = inputs()
    pipe.unet(x, t, context)
    before = [tensor.data_ptr() for tensor in attention.keys_values[2, 77, 64]]
    pipe.unet(x, t, noise(2, 77, 64, seed=9))
    assert before == [tensor.data_ptr() for tensor in attention.keys_values[2, 77, 64]]


# ---- timesteps


@pytest.mark.parametrize(
    "t", [0, 1, 999, torch.tensor([3, 700]), torch.tensor(12.5), torch.tensor([0.5, 998.7])], ids=str
)
@torch.inference_mode()
def test_time_cache_knows_every_timestep(make, t):
    x, _, context = inputs()
    t = torch.as_tensor(t)
    assert error(make("time-cache").unet(x, t, context), make().unet(x, t, context)) < 1e-5


@torch.inference_mode()
def test_time_cache_serves_every_number_of_steps(make):
    fast, plain = make("time-cache"), make()
    for steps in (2, 3, 7):
        draw = {**DRAW, "steps": steps}
        assert np.abs(pixels(fast.generate("a cat", **draw)) - pixels(plain.generate("a cat", **draw))).max() <= 1


# ---- attention


@pytest.mark.parametrize(
    ("chip", "dtype", "head_size", "backend"),
    [
        (Chip("cpu"), torch.float32, 40, "flash"),
        (Chip("cpu"), torch.float32, 512, "flash"),
        (Chip("mps"), torch.float16, 40, "math"),
        (Chip("cuda", (7, 5)), torch.float16, 40, "efficient"),
        (Chip("cuda", (7, 5)), torch.float16, 512, "math"),
        (Chip("cuda", (8, 0)), torch.float16, 40, "flash"),
        (Chip("cuda", (8, 6)), torch.bfloat16, 256, "flash"),
        (Chip("cuda", (8, 0)), torch.float16, 512, "math"),
        (Chip("cuda", (8, 0)), torch.float32, 40, "efficient"),
        (Chip("cuda", (9, 0)), torch.float16, 160, "cudnn"),
        (Chip("cuda", (9, 0)), torch.float16, 512, "efficient"),
        (Chip("cuda", (12, 0)), torch.float16, 40, "flash"),
    ],
)
def test_attention_backend_by_chip(chip, dtype, head_size, backend):
    assert backend_for(chip, dtype, head_size) == backend


@pytest.mark.parametrize(
    ("names", "backends"),
    [([], {"flash", "math"}), (["naive"], {"naive"}), (["attention=math"], {"math"}), (["attention"], {"flash"})],
)
def test_attention_report_tells_what_ran(make, names, backends):
    """Plain, the VAE falls to math: its heads are not side by side in memory, which flash wants."""
    pipe = make(*names)
    runs = optimize.attention_report(pipe, 64, 64)
    assert {run.backend for run in runs} == backends
    assert [run.module for run in runs[:2]] == ["clip.encoder.layers.0.self_attn", "clip.encoder.layers.1.self_attn"]
    cross = next(run for run in runs if run.module == "unet.middle_block.1.transformer_blocks.0.attn2")
    assert (cross.q, cross.keys) == ((2, 8, 1, 16), 77)
    assert runs[-1].module == "vae.decoder.mid.attn_1"
    attention = pipe.unet.middle_block[1].transformer_blocks[0].attn2
    assert ("attend" in vars(attention)) == bool(names), "the report leaves no trace"


# ---- fewer passes


def calls_in_picture(pipe: StableDiffusion, module: nn.Module, **changes) -> list[int]:
    batches: list[int] = []
    module.register_forward_hook(lambda _, args, out: batches.append(args[0].shape[0]))
    pipe.generate("a cat", **{**DRAW, **changes})
    return batches


def test_deepcache_runs_the_deep_levels_at_every_nth_step(make):
    pipe = make("deepcache=3")
    assert len(calls_in_picture(pipe, pipe.unet.middle_block, steps=7)) == 3
    assert len(calls_in_picture(pipe, pipe.unet.out, steps=7)) == 7


def test_deepcache_starts_each_picture_anew(make):
    pipe = make("deepcache=3")
    first = pixels(pipe.generate("a cat", **{**DRAW, "steps": 5}))
    pipe.generate("a dog", **DRAW)
    assert np.array_equal(first, pixels(pipe.generate("a cat", **{**DRAW, "steps": 5})))


def test_deepcache_differs_from_plain_a_little(make):
    a, b = (pixels(make(*names).generate("a cat", **DRAW)) for names in (["deepcache=2"], []))
    assert 0 < np.abs(a - b).mean() < 32


def test_guidance_interval_halves_the_batch_outside(make):
    pipe = make("guidance-interval=0.0-0.5", "kv-cache")
    assert calls_in_picture(pipe, pipe.unet.middle_block, steps=4) == [2, 2, 1, 1]


@pytest.mark.parametrize("others", [[], ["kv-cache", "time-cache", "packed-qkv", "shared-halves"]], ids=str)
def test_guidance_interval_outside_is_the_conditional_half(make, others):
    late = make("guidance-interval=0.99-1.0", *others).generate(["a cat", "a dog"], **DRAW)
    unguided = make().generate(["a cat", "a dog"], **{**DRAW, "cfg_scale": 1})
    assert np.abs(pixels(late) - pixels(unguided)).max() <= 1


def test_guidance_interval_leaves_unguided_pictures_alone(make):
    draw = {**DRAW, "cfg_scale": 1}
    a, b = (pixels(make(*names).generate("a cat", **draw)) for names in (["guidance-interval=0.0-0.5"], []))
    assert np.array_equal(a, b)


# ---- what both halves of guidance share


@pytest.mark.parametrize(("scale", "rows"), [(7.5, [2, 2, 4, 4]), (1, [2, 2, 2, 2])])
def test_shared_halves_compute_what_precedes_the_text_once(make, scale, rows):
    """Two pictures: half of the batch of 4 up to the first self-attention, all of it after; without guidance all."""
    pipe, seen = make("shared-halves"), []
    first = pipe.unet.input_blocks[1][1].transformer_blocks[0]
    projection = pipe.unet.input_blocks[1][0].in_layers[2], first.attn1.to_q, first.attn2.to_q, first.ff.net[2]
    for module in projection:
        module.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    pipe.generate(["a cat", "a dog"], **{**DRAW, "steps": 1, "cfg_scale": scale})
    assert seen == rows


def test_shared_halves_leave_other_calls_of_the_unet_alone(make):
    pipe, plain = make("shared-halves"), make()
    pipe.generate("a cat", **DRAW)
    assert torch.equal(pipe.unet(*inputs()), plain.unet(*inputs()))


def test_shared_halves_with_a_guidance_interval(make):
    names = ["guidance-interval=0.0-0.5"]
    a, b = (pixels(make(*names, *more).generate(["a cat", "a dog"], **DRAW)) for more in ([], ["shared-halves"]))
    assert np.abs(a - b).max() <= 1


def test_graphs_with_shared_halves_tell_guided_calls_from_others(make):
    """A picture with guidance and two without have inputs of the same shape."""
    pipe, plain = make("shared-halves"), make()
    state = lambda: pipe.unet.halves.alike  # noqa: E731
    pipe.unet.forward = graphs.Graphed(pipe.unet.forward, pipe.unet, state=state, capture=stand_in)
    for prompt, scale in (("a cat", 7.5), (["a cat", "a dog"], 1), ("a cat", 7.5)):
        draw = {**DRAW, "cfg_scale": scale}
        assert np.abs(pixels(pipe.generate(prompt, **draw)) - pixels(plain.generate(prompt, **draw))).max() <= 1


# ---- noise


def picture_noise(seed: int = 0) -> PictureNoise:
    return PictureNoise([seed, seed + 1], (4, 8, 8), CPU, torch.float32)


def test_async_noise_is_the_same_noise():
    plain, other, at_once = picture_noise(), graphs.AsyncNoise(picture_noise()), graphs.AsyncNoise(picture_noise())
    expected = torch.stack([plain() for _ in range(3)])
    assert torch.equal(torch.stack([other() for _ in range(3)]), expected)
    assert torch.equal(at_once.draw(3, expected[0]), expected)
    assert at_once.draw(0, expected[0]).shape == (0, 2, 4, 8, 8)


@pytest.mark.parametrize(("sampler", "draws"), [("ddpm", 5), ("ddim", 0)])
def test_count_draws(sampler, draws):
    assert graphs.count_draws(sampler, spaced_timesteps(5)) == draws


# ---- CUDA graphs, with a stand-in for the capture


def stand_in(function, given):
    """What `graphs.record` returns, replaying by calling: the first output's memory is where each result goes."""
    places = tuple(tensor.clone() for tensor in given)
    output = function(*places)

    def replay() -> None:
        new = function(*places)
        for kept, value in zip(as_list(output), as_list(new), strict=True):
            kept.copy_(value)

    return graphs.Recording(places, replay, output)


def as_list(output: Tensor | list[Tensor]) -> list[Tensor]:
    return output if isinstance(output, list) else [output]


@torch.no_grad()
def test_graph_is_recorded_once_a_shape(make):
    pipe, plain = make(), make()
    graphed = graphs.Graphed(pipe.unet.forward, pipe.unet, capture=stand_in)
    pipe.unet.forward = graphed
    for batch, side in ((2, 8), (2, 8), (1, 8), (2, 16), (2, 8)):
        given = inputs(batch, side)
        assert torch.equal(pipe.unet(*given), plain.unet(*given))
    assert graphed.recordings.captures == 3


@torch.no_grad()
def test_graph_gives_away_its_output(make):
    pipe = make()
    graphed = graphs.Graphed(pipe.unet.forward, pipe.unet, capture=stand_in)
    first = graphed(*inputs())
    kept = first.clone()
    graphed(*inputs(seed=5))
    assert torch.equal(first, kept)


@torch.no_grad()
def test_graph_is_recorded_again_when_weights_move(make):
    pipe, plain = make("kv-cache", "time-cache", "packed-qkv"), make()
    graphed = graphs.Graphed(pipe.unet.forward, pipe.unet, capture=stand_in)
    pipe.unet.forward = graphed
    for change, captures in ((change_in_place, 1), (replace, 2), (change_in_place, 2)):
        given = inputs()
        assert error(pipe.unet(*given), plain.unet(*given)) < 1e-5
        change(pipe.unet)
        change(plain.unet)
        assert error(pipe.unet(*given), plain.unet(*given)) < 1e-5
        assert graphed.recordings.captures == captures


def test_graphs_are_limited_in_number(make):
    pipe = make()
    graphed = graphs.Graphed(lambda x: x + 1, pipe.unet, capture=stand_in)
    for size in range(1, 2 * graphs.MAX_GRAPHS):
        graphed(torch.zeros(size))
    assert len(graphed.recordings.kept) == graphs.MAX_GRAPHS


def test_graph_depends_on_the_phase_of_a_cache(make):
    pipe, plain = make("deepcache=2"), make("deepcache=2")
    graphed = graphs.Graphed(pipe.unet.forward, pipe.unet, state=lambda: pipe.unet.deep.reuse, capture=stand_in)
    pipe.unet.forward = graphed
    a, b = (pixels(p.generate("a cat", **DRAW)) for p in (pipe, plain))
    assert np.array_equal(a, b)
    assert graphed.recordings.captures == 2


LOOPS = (
    {},
    {"seed": 9},
    {"prompt": "a dog"},
    {"sampler": "ddim"},
    {"steps": 3},
    {"cfg_scale": 1},
    {"cfg_scale": 2.0},
    {"negative_prompt": "a dog"},
    {},
)


@pytest.mark.parametrize("names", [[], ["kv-cache", "time-cache", "packed-qkv", "guidance-interval=0.0-0.5"]], ids=str)
def test_loop_graph(make, names):
    """One recording serves every prompt and seed; sampler, steps, scale and shape need their own."""
    pipe, plain = make(*names), make(*names)
    pipe.sample = loop = graphs.GraphedLoop(pipe, capture=stand_in)
    for changes in LOOPS:
        draw = {"prompt": "a cat", **DRAW, **changes}
        assert np.array_equal(pixels(pipe.generate(**draw)), pixels(plain.generate(**draw))), changes
    assert loop.recordings.captures == 5


def test_loop_graph_reports_all_steps_at_the_end(make):
    pipe, plain = make(), make()
    pipe.sample = graphs.GraphedLoop(pipe, capture=stand_in)
    seen: dict[str, list] = {"loop": [], "plain": []}
    for p, key in ((pipe, "loop"), (plain, "plain")):
        p.generate("a cat", **DRAW, on_step=lambda i, n, x, key=key: seen[key].append((i, n, x.clone())))
    assert [s[:2] for s in seen["loop"]] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(seen["loop"], seen["plain"], strict=True))


def test_host_constants_are_made_once():
    constants = graphs.HostConstants()
    with constants:
        first = torch.tensor([3, 2, 1])
    with constants:
        assert torch.tensor([3, 2, 1]) is first
        assert torch.tensor([3, 2, 2]) is not first


# ---- tiles


@pytest.mark.parametrize("length", [5, 16, 17, 31, 64, 100])
def test_tiles_cover_and_overlap(length):
    starts = tiling.tile_starts(length, 16, 4)
    assert starts[0] == 0
    assert starts[-1] + 16 >= length
    assert all(0 < b - a <= 12 for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (40, 16), (16, 40), (33, 50)])
def test_tiles_of_a_local_decoder_join_without_a_trace(height, width):
    decode = lambda x: nn.functional.interpolate(x[:, :3], scale_factor=8.0, mode="nearest")  # noqa: E731
    latents = noise(2, 4, height, width)
    assert error(tiling.decode_in_tiles(decode, latents, 16, 4), decode(latents)) < 1e-6


@torch.inference_mode()
def test_vae_tiling_on_the_model(make):
    tiled, plain = make("vae-tiling=16"), make()
    small, large = noise(1, 4, 16, 16), noise(1, 4, 24, 40)
    assert torch.equal(tiled.vae.decode(small), plain.vae.decode(small))
    assert tiled.vae.decode(large).shape == plain.vae.decode(large).shape
    assert error(tiled.vae.decode(large), plain.vae.decode(large)) < 0.5


# ---- the stages of the UNet


@torch.inference_mode()
def test_staged_unet_is_the_plain_one_to_the_bit(make):
    staged, plain, given = make(), make(), inputs()
    staged.unet.__class__ = cache.StagedUNet
    assert torch.equal(staged.unet(*given), plain.unet(*given))


# ---- compilation

ONE_LEVEL = tiny_config(
    unet={"channel_mult": (1,), "attention_levels": (0,)}, vae={"ch_mult": (1,)}, image_size=8, name="one level"
)  # 4 graphs to compile


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_compile(tokenizer, tmp_path, monkeypatch):
    """The same pictures; and once one is drawn, no graph break and no recompilation for anything but another shape."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    models = random_models(ONE_LEVEL)
    fast, plain = (StableDiffusion(ONE_LEVEL, *map(fresh, build(ONE_LEVEL), models), tokenizer) for _ in range(2))
    optimize.apply(fast, ["compile", "kv-cache", "time-cache", "packed-qkv"])
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
    assert optimize.compile_seconds() > 0
    assert list(fast.unet.state_dict()) == list(plain.unet.state_dict())


# ---- oneDNN's layout


@pytest.fixture
def few_weights(monkeypatch):
    monkeypatch.setattr(onednn, "MIN_WEIGHTS", 0)


@pytest.mark.skipif(not onednn.available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("rest", [False, True], ids=["alone", "with the rest"])
@torch.inference_mode()
def test_prepacked(make, few_weights, rest):
    fast = make("prepacked", *(name for name in EXACT_ON_CPU if rest and name not in KERNELS))
    assert any(isinstance(m, onednn.PrepackedConv) for m in fast.unet.modules())
    assert any(isinstance(m, onednn.PrepackedLinear) for m in fast.unet.modules())
    assert_same(fast, make(), 1e-5)


@pytest.mark.skipif(not onednn.available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("change", [change_in_place, replace, load])
@torch.no_grad()
def test_prepacked_sees_changed_weights(make, few_weights, change):
    fast, plain, given = make("prepacked"), make(), inputs()
    fast.unet(*given)
    change(fast.unet)
    change(plain.unet)
    assert error(fast.unet(*given), plain.unet(*given)) < 1e-5


@pytest.mark.skipif(not onednn.available(), reason="this PyTorch has no oneDNN")
def test_prepacked_takes_large_layers_only(make):
    assert not any(
        isinstance(m, (onednn.PrepackedConv, onednn.PrepackedLinear)) for m in make("prepacked").unet.modules()
    )


# ---- freed memory kept


def test_keep_memory_draws_the_same(make):
    a, b = (pixels(make(*names).generate("a cat", **DRAW)) for names in (["keep-memory"], []))
    assert np.array_equal(a, b)

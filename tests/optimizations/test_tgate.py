"""T-GATE against the authors' package on diffusers, and against its definition written out over the plain modules."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.reference.numbers import noise, pixels, relative_error
from bench.reference.oracles import ddim_scheduler, diffusers_pipeline
from sd import optimizations
from sd.guidance import Conditions, Guided
from sd.optimizations import OptimizationError
from sd.pipeline import StableDiffusion
from sd.samplers import choose
from sd.schedules import leading
from sd.unet import BasicTransformerBlock, UNet
from tests.optimizations.stand_in import install
from tests.optimizations.support import DRAW
from tests.sparing import sparing

PROMPTS, STEPS = ["a cat", "a dog"], 5


def latents_of(pipe: StableDiffusion, **changes) -> list[Tensor]:
    """The latents after each step of a picture by DDIM."""
    seen: list[Tensor] = []
    draw = {"prompt": PROMPTS, **DRAW, "steps": STEPS, "sampler": "ddim", **changes}
    pipe.generate(**draw, on_step=lambda i, n, x: seen.append(x.clone()))
    return seen


def draw(pipe: StableDiffusion, **changes) -> np.ndarray:
    return pixels(pipe.generate(**{"prompt": PROMPTS, **DRAW, **changes}))


# ---- what it is compared with


@pytest.mark.parametrize("step", [1, 2, 4])
@torch.inference_mode()
def test_latents_are_those_of_the_authors_package(make, step):
    """Of its two parts the first: the second, self-attention used again, is off with these intervals."""
    from tgate import TgateSDLoader  # here, for it takes seconds to import

    pipe, start = make(f"tgate={step}"), noise(2, 4, 8, 8, seed=5)
    theirs = TgateSDLoader(diffusers_pipeline(make(), ddim_scheduler()))
    options = {"gate_step": step, "warm_up": step, "sp_interval": 1, "fi_interval": 1}
    expected = theirs.tgate(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        latents=start.clone(),
        height=DRAW["height"],
        width=DRAW["width"],
        output_type="latent",
        **options,
    ).images
    actual = latents_of(pipe, latents=start, cfg_scale=7.5)[-1]
    plain = latents_of(make(), latents=start, cfg_scale=7.5)[-1]
    assert relative_error(actual, expected) < 1e-5
    assert relative_error(plain, expected) > 1e-4, "it does something"


class WrittenOut:
    """The definition, by hooks on a plain UNet that is called as guidance calls it, and with no halving.

    After the gate both halves run, which hold the same latents, and both are given the mean.
    """

    def __init__(self, unet: UNet, step: int, guided: bool):
        self.unet, self.step, self.guided, self.calls = unet, step, guided, 0
        self.means: dict[int, Tensor] = {}
        for module in unet.modules():
            if isinstance(module, BasicTransformerBlock):
                module.attn2.register_forward_hook(self.hook)

    def hook(self, attention: torch.nn.Module, given: tuple, y: Tensor) -> Tensor | None:
        if self.calls >= self.step:
            return self.means[id(attention)]
        half = len(y) // 2
        self.means[id(attention)] = torch.cat([(y[:half] + y[half:]) / 2] * 2) if self.guided else y
        return None

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        eps = self.unet(x, t, context)
        self.calls += 1
        return eps


def written_out(pipe: StableDiffusion, step: int, scale: float, start: Tensor, steps: int = STEPS) -> Tensor:
    """DDIM's last latents."""
    context = pipe.encode_prompts(PROMPTS, ["", ""] if scale != 1 else None)
    predict = WrittenOut(pipe.unet, step, guided=scale != 1)
    *_, x = choose("ddim")(Guided(predict, Conditions(context, scale)), start, leading(steps), lambda: None)
    return x


OTHERS: list[list[str]] = [
    [],
    ["kv-cache", "time-cache"],
    ["packed-qkv"],
    ["shared-halves", "kv-cache", "packed-qkv"],
    ["channels-last", "pointwise-linear"],
    ["cpu-attention", "cpu-linear", "cpu-norm", "winograd"],
    ["naive", "async-noise", "keep-memory"],
]


@pytest.mark.parametrize("others", sparing(OTHERS, lambda others: others in OTHERS[:2]), ids=",".join)
@pytest.mark.parametrize("scale", sparing([7.5, 1], lambda scale: scale != 1))
@torch.inference_mode()
def test_latents_are_those_of_the_definition(make, others, scale):
    """Two pictures at once, guided and not, alone and beside others."""
    pipe, start = make("tgate=2", *others), noise(2, 4, 16, 8, seed=5)
    expected = written_out(make(), 2, scale, start)
    options = {"latents": start, "cfg_scale": scale, "height": 32}
    assert relative_error(latents_of(pipe, **options)[-1], expected) < 1e-5
    assert relative_error(latents_of(make(), **options)[-1], expected) > 1e-3


# ---- what runs


def batches(pipe: StableDiffusion, module: torch.nn.Module, **changes) -> list[int]:
    """The batch of each call of a module in a picture of two."""
    seen: list[int] = []
    hook = module.register_forward_hook(lambda _, given, out: seen.append(len(given[0])))
    draw(pipe, **changes)
    hook.remove()
    return seen


@pytest.mark.parametrize(
    ("changes", "unet", "text"), [({}, [4, 4, 2, 2], [4, 4]), ({"cfg_scale": 1}, [2, 2, 2, 2], [2, 2])], ids=str
)
def test_half_the_batch_and_no_text_is_left(make, changes, unet, text):
    pipe = make("tgate=2")
    attention = pipe.unet.middle_block[1].transformer_blocks[0].attn2
    assert batches(pipe, pipe.unet.out, **changes) == unet
    assert batches(pipe, attention.to_q, **changes) == text


@pytest.mark.parametrize("changes", [{}, {"cfg_scale": 1}], ids=str)
def test_up_to_the_gate_nothing_is_changed(make, changes):
    gated, plain = (latents_of(make(*names), **changes) for names in (["tgate=3"], []))
    assert [torch.equal(a, b) for a, b in zip(gated, plain, strict=True)] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("step", sparing([4, 5, 10], lambda step: step == 4))
@pytest.mark.parametrize("others", [[], ["deepcache=3"]], ids=str)
def test_a_gate_at_the_end_changes_nothing(make, step, others):
    assert np.array_equal(draw(make(f"tgate={step}", *others)), draw(make(*others)))


def test_with_an_init_image_the_steps_that_are_run_count(make):
    pipe, plain = make("tgate=2"), make()
    (image,) = plain.generate("a fox", **DRAW)
    half, all_of_it = {"init_image": image, "strength": 0.5}, {"init_image": image, "strength": 1.0}
    assert np.array_equal(draw(pipe, **half), draw(plain, **half)), "2 of 4 steps"
    assert batches(pipe, pipe.unet.out, **all_of_it) == [4, 4, 2, 2]


def test_each_picture_starts_anew(make):
    pipe = make("tgate=2", "kv-cache", "shared-halves", "deepcache=3")
    first, alone = draw(pipe), draw(pipe, prompt="a dog", seed=4)
    draw(pipe, prompt=["a fox", "a tree"], seed=9)
    draw(pipe, cfg_scale=1)
    assert np.array_equal(draw(pipe), first)
    assert np.abs(alone[0] - first[1]).max() <= 1, "one seed is one picture, in any batch"


def test_what_is_kept_is_written_to_in_any_mode(make):
    pipe = make("tgate=1")
    expected = latents_of(pipe)[-1]
    with torch.no_grad():
        latents_of(pipe, prompt="a fox")
        unguarded: Callable = StableDiffusion.generate.__wrapped__
        seen: list[Tensor] = []
        options = {**DRAW, "steps": STEPS, "sampler": "ddim", "on_step": lambda i, n, x: seen.append(x.clone())}
        unguarded(pipe, PROMPTS, **options)
    assert relative_error(seen[-1], expected) < 1e-6


def test_deepcache_runs_the_deep_levels_where_outputs_are_kept_and_where_the_batch_changes(make):
    pipe = make("deepcache=3", "tgate=3")
    assert batches(pipe, pipe.unet.middle_block, steps=8) == [4, 4, 2, 2]  # at steps 0, 2, 3 and 6
    assert batches(pipe, pipe.unet.out, steps=8) == [4] * 3 + [2] * 5


# ---- graphs


BESIDE = [["kv-cache", "time-cache", "packed-qkv", "shared-halves"], [], ["deepcache=2"]]


@pytest.mark.parametrize("others", sparing(BESIDE, lambda others: others == BESIDE[0]))
@pytest.mark.parametrize("graph", sparing(["cuda-graph", "loop-graph"], lambda graph: graph == "cuda-graph"))
def test_graphs(make, monkeypatch, graph, others):
    install(monkeypatch)
    pipe, plain = make("tgate=2", *others, graph), make("tgate=2", *others)
    changes = (
        {},
        {"seed": 8},
        {"prompt": ["a fox", "a tree"]},
        {"steps": 2},
        {"cfg_scale": 1},
        {"prompt": "a cat"},
        {},
    )
    for each in changes:
        assert np.abs(draw(pipe, **each) - draw(plain, **each)).max() <= 1, each


def test_three_graphs_serve_all_steps(make, monkeypatch):
    captured = install(monkeypatch)
    pipe = make("tgate=2", "cuda-graph")
    for steps in (4, 6):
        draw(pipe, steps=steps)
    of_text_and_decoder = 2
    assert len(captured.captured) == 3 + of_text_and_decoder


def test_a_graph_tells_guided_calls_from_others(make, monkeypatch):
    """A picture with guidance and two without have inputs of the same shape where outputs are kept."""
    install(monkeypatch)
    pipe, plain = make("tgate=2", "cuda-graph"), make("tgate=2")
    for changes in ({"prompt": "a cat"}, {"cfg_scale": 1}, {"prompt": "a cat"}):
        assert np.abs(draw(pipe, **changes) - draw(plain, **changes)).max() <= 1, changes


# ---- the switch


def test_it_cannot_stand_beside_guidance_interval(make):
    with pytest.raises(OptimizationError, match=r"tgate cannot be combined with guidance-interval"):
        make("tgate", "guidance-interval")


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "x"])
def test_steps_that_are_none(value):
    with pytest.raises(OptimizationError, match="a whole number from 1 on"):
        optimizations.check(f"tgate={value}")


def test_explain_and_undo(make):
    pipe, plain = make("tgate=2", "kv-cache"), make()
    rows = [row for row in pipe.explain().rows if "tgate" in row.switches]
    assert {row.module.split(".")[-1] for row in rows} == {"forward()", "unet", "attn2"}
    told = "keys and values once a prompt, its output kept from step 2 on, attention: SDPA, as PyTorch picks"
    assert {row.kernel for row in rows} == {"wrapped", told}
    draw(pipe)
    optimizations.undo(pipe)
    assert np.array_equal(draw(pipe), draw(plain))
    assert pipe.explain() == plain.explain()

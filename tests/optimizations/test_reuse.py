"""What is computed once and used again: when it is computed, and that it notices what changes."""

import numpy as np
import pytest
import torch
from torch import nn

from bench.reference.numbers import noise, pixels, relative_error
from sd.pipeline import StableDiffusion
from tests.optimizations.stand_in import install
from tests.optimizations.support import DRAW, inputs

# ---- packed projections


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
        assert relative_error(fast.unet(x, t, other), plain.unet(x, t, other)) < 1e-5
    assert len(calls) == 4


@torch.no_grad()
def test_kv_cache_sees_a_context_written_to(make):
    fast, plain = make("kv-cache"), make()
    x, t, context = inputs()
    fast.unet(x, t, context)
    context.mul_(2)
    assert relative_error(fast.unet(x, t, context), plain.unet(x, t, context)) < 1e-5


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
    assert relative_error(make("time-cache").unet(x, t, context), make().unet(x, t, context)) < 1e-5


@torch.inference_mode()
def test_time_cache_serves_every_number_of_steps(make):
    fast, plain = make("time-cache"), make()
    for steps in (2, 3, 7):
        draw = {**DRAW, "steps": steps}
        assert np.abs(pixels(fast.generate("a cat", **draw)) - pixels(plain.generate("a cat", **draw))).max() <= 1


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


@torch.no_grad()
def test_deepcache_is_what_its_paper_defines(make):
    """A step in between: the outermost blocks on the new latents, around the features of the step before."""
    fast, plain = make("deepcache=2").unet, make().unet
    first, (x, t, context) = inputs(), inputs(seed=7, t=21)
    features: list[torch.Tensor] = []
    plain.output_blocks[-2].register_forward_hook(lambda block, args, out: features.append(out))
    assert relative_error(fast(*first), plain(*first)) < 1e-6
    emb = plain.time_embed(t, x)
    skip = plain.input_blocks[0](x, emb, context)
    expected = plain.out(plain.output_blocks[-1](torch.cat([features[0], skip], dim=1), emb, context))
    deep = vars(fast)["deep"]
    deep.call.step = 1
    assert relative_error(fast(x, t, context), expected) < 1e-6
    deep.call.step = 2
    assert relative_error(fast(x, t, context), plain(x, t, context)) < 1e-6


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


@pytest.mark.parametrize(("interval", "batches"), [("0.0-0.5", [2, 2, 1, 1]), ("0.2-0.6", [1, 2, 2, 1, 1])])
def test_deepcache_with_a_guidance_interval_runs_the_deep_levels_where_the_batch_changes(make, interval, batches):
    """Seven steps, of which the first, fourth and seventh run them anyway."""
    pipe = make("deepcache=3", f"guidance-interval={interval}")
    assert calls_in_picture(pipe, pipe.unet.middle_block, steps=7) == batches


@pytest.mark.parametrize("graph", [[], ["cuda-graph"], ["loop-graph"]], ids=str)
def test_deepcache_with_a_guidance_interval_starts_each_picture_anew(make, monkeypatch, graph):
    """Features of the other batch, which an earlier picture has left, have the right shape too."""
    install(monkeypatch)
    names = ["deepcache=3", "guidance-interval=0.25-0.75"]
    pipe = make(*names, *graph)
    first = pixels(make(*names).generate("a cat", **DRAW))
    for prompt in ("a dog", "a fox"):
        pipe.generate(prompt, **{**DRAW, "seed": 9})
    assert np.abs(pixels(pipe.generate("a cat", **DRAW)) - first).max() <= 1


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

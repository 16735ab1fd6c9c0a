"""The whole way from prompt to picture against diffusers' pipelines, and what `generate` promises."""

import copy
import itertools
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from bench.reference import oracles
from bench.reference.numbers import noise, pixels
from bench.reference.oracles import diffusers_pipeline
from bench.reference.weights import tiny_config
from sd.images import to_pil
from sd.pipeline import StableDiffusion
from tests.weights import random_models, shallow_pipeline

PROMPTS = ["a lighthouse in a storm", "two red apples"]
NEGATIVE = "blurry"
SMALL = tiny_config(
    unet={"channel_mult": (1, 2), "attention_levels": (0, 1)}, image_size=32
)  # sizes are multiples of 16


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return StableDiffusion(SMALL, *random_models(SMALL, seed=3))


def differ(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of any byte."""
    return int(np.abs(pixels(a) - pixels(b)).max())


def detailed(image: Image.Image) -> bool:
    """That a comparison means something: the picture is neither flat nor all clipped."""
    array = np.asarray(image)
    return array.std() > 5 and ((array > 0) & (array < 255)).mean() > 0.5


@pytest.mark.parametrize(("sampler", "scheduler"), [("ddpm", oracles.ddpm_scheduler), ("ddim", oracles.ddim_scheduler)])
@pytest.mark.parametrize("cfg_scale", [7.5, 1.0])
def test_fifty_steps_against_diffusers(pipe, sampler, scheduler, cfg_scale):
    seeds = [11, 12]
    ours = pipe.generate(PROMPTS, NEGATIVE, 50, cfg_scale, seeds, 32, 48, sampler)
    theirs = diffusers_pipeline(pipe, scheduler())(
        PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        height=32,
        width=48,
        num_inference_steps=50,
        guidance_scale=cfg_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images
    for a, b in zip(ours, theirs, strict=True):
        assert a.size == (48, 32)
        assert detailed(a)
        assert differ(a, b) <= 1


def test_given_latents_against_diffusers(pipe):
    latents = noise(1, 4, 4, 4)
    before = latents.clone()
    ours = pipe.generate(PROMPTS[0], steps=10, seed=5, height=32, width=32, latents=latents)
    theirs = diffusers_pipeline(pipe, oracles.ddpm_scheduler())(
        PROMPTS[0],
        height=32,
        width=32,
        num_inference_steps=10,
        latents=latents.clone(),
        generator=torch.Generator().manual_seed(5),
    ).images
    assert differ(ours[0], theirs[0]) <= 1
    assert torch.equal(latents, before)


@pytest.mark.parametrize(("steps", "strength"), [(100, 0.01), (50, 0.5), (50, 1.0)])
@pytest.mark.parametrize(("sampler", "scheduler"), [("ddpm", oracles.ddpm_scheduler), ("ddim", oracles.ddim_scheduler)])
def test_image_to_image_against_diffusers(pipe, sampler, scheduler, steps, strength):
    assert_image_to_image_matches(pipe, scheduler(), smooth_noise(48, 32), steps, strength, sampler=sampler)


def test_where_diffusers_would_make_no_step_one_is_made(pipe):
    init = smooth_noise(48, 32)
    ours = pipe.generate(PROMPTS[0], steps=50, seed=9, height=32, width=48, init_image=init, strength=0.01)
    one_step = diffusers_pipeline(pipe, oracles.ddpm_scheduler(), StableDiffusionImg2ImgPipeline)(
        PROMPTS[0], image=init, strength=0.02, num_inference_steps=50, generator=torch.Generator().manual_seed(9)
    ).images
    assert differ(ours[0], one_step[0]) <= 1


def smooth_noise(width: int, height: int) -> Image.Image:
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)


def assert_image_to_image_matches(pipe, scheduler, init, steps, strength, sampler="ddpm"):
    """Every byte within 1 of diffusers' picture made from the same weights, picture, strength and noise."""
    width, height = init.size
    shared = {"init_image": init, "strength": strength, "sampler": sampler}
    ours = pipe.generate(PROMPTS[0], NEGATIVE, steps, 7.5, 9, height, width, **shared)[0]
    theirs = diffusers_pipeline(pipe, scheduler, StableDiffusionImg2ImgPipeline)(
        PROMPTS[0],
        image=init,
        strength=strength,
        negative_prompt=NEGATIVE,
        num_inference_steps=steps,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(9),
    ).images[0]
    assert detailed(ours)
    assert differ(ours, theirs) <= 1


def test_the_smallest_strength_still_makes_one_step(pipe):
    calls = []
    init = Image.new("RGB", (32, 32), "red")
    pipe.generate("x", steps=50, init_image=init, strength=0.001, on_step=lambda *step: calls.append(step[:2]))
    assert calls == [(1, 1)]


def test_same_seed_same_bytes(pipe):
    first, second = (pipe.generate(PROMPTS[0], steps=3, seed=1)[0] for _ in range(2))
    assert differ(first, second) == 0
    assert differ(first, pipe.generate(PROMPTS[0], steps=3, seed=2)[0]) > 0


def test_items_of_a_batch_equal_their_single_runs(pipe):
    batch = pipe.generate([*PROMPTS, ""], NEGATIVE, steps=10, seed=[4, 5, 6])
    for prompt, seed, together in zip([*PROMPTS, ""], (4, 5, 6), batch, strict=True):
        alone = pipe.generate(prompt, NEGATIVE, steps=10, seed=seed)[0]
        assert differ(alone, together) <= 1


def test_prompts_and_seeds_are_broadcast(pipe):
    assert [i.info["seed"] for i in pipe.generate(PROMPTS, steps=1, seed=7)] == [7, 8]
    assert [i.info["prompt"] for i in pipe.generate("x", steps=1, seed=[1, 2, 3])] == ["x"] * 3
    info = pipe.generate(PROMPTS, ["a", "b"], steps=1, seed=0)[1].info
    assert (info["prompt"], info["negative_prompt"], info["steps"]) == (PROMPTS[1], "b", 1)


def test_a_seed_is_drawn_and_told(pipe):
    a, b = (pipe.generate("x", steps=1)[0] for _ in range(2))
    assert a.info["seed"] != b.info["seed"]
    assert differ(a, pipe.generate("x", steps=1, seed=a.info["seed"])[0]) == 0


def test_default_size_is_the_models(pipe):
    side = pipe.config.image_size
    assert pipe.generate("x", steps=1)[0].size == (side, side)


def test_size_from_the_init_image_keeps_its_shape(pipe):
    side = pipe.config.image_size
    wide = pipe.generate("x", steps=1, init_image=Image.new("RGB", (400, 100)))[0]
    assert wide.size == (2 * side, side // 2)


def test_on_step_sees_every_step(pipe):
    seen = []
    pipe.generate("x", steps=4, on_step=lambda i, n, latents: seen.append((i, n, latents.shape[1])))
    assert seen == [(i, 4, pipe.config.vae.z_channels) for i in range(1, 5)]


def test_stage_times(pipe, monkeypatch):
    """By a clock that is a second on each time that somebody looks: twice a stage."""
    pipe.times.clear()
    monkeypatch.setattr("sd.pipeline.time", SimpleNamespace(perf_counter=itertools.count().__next__))
    pipe.generate("x", steps=1)
    assert pipe.times == {"text": 1, "denoise": 1, "decode": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be from 1 to 1000"),
        ({"steps": 1001}, "steps must be from 1 to 1000"),
        ({"cfg_scale": float("nan")}, "cfg_scale"),
        ({"strength": 0.0}, "strength"),
        ({"strength": 2.0}, "strength"),
        ({"sampler": "magic"}, "ddpm, ddim"),
        ({"height": 33}, "height 32 or 48"),
        ({"seed": -1}, "seed"),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "differ in number"),
        ({"prompt": []}, "at least one"),
        ({"latents": torch.zeros(1, 1, 1, 1)}, "latents are"),
    ],
)
def test_values_out_of_range(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.generate(**{"prompt": "x", **arguments})


def test_a_vae_that_overflows_is_run_again_in_fp32(pipe, caplog):
    half = StableDiffusion(SMALL, *random_models(SMALL, seed=3, dtype=torch.bfloat16))
    whole = copy.deepcopy(half.vae).float()
    last = []

    def overflow(latents):
        return torch.full_like(latents, float("inf"))

    half.vae.decode = overflow
    with caplog.at_level(logging.WARNING):
        again = half.generate("x", steps=1, seed=0, on_step=lambda _step, _steps, x: last.append(x))[0]
    assert "fp32" in caplog.text
    with torch.no_grad():
        expected = to_pil(whole.decode(last[0].float() / SMALL.vae.scale_factor))[0]
    assert detailed(again)
    assert differ(expected, again) <= 1


def test_nan_in_fp32_is_an_error_not_a_black_picture():
    broken = StableDiffusion(SMALL, *random_models(SMALL, seed=3))
    broken.vae.decoder.conv_in.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        broken.generate("x", steps=1)


def test_save_and_load_again(pipe, tmp_path):
    path = tmp_path / "model.safetensors"
    pipe.save(path)
    loaded = StableDiffusion.load(path, device="cpu")
    assert loaded.config == pipe.config
    a, b = (p.generate(PROMPTS[0], steps=2, seed=0)[0] for p in (pipe, loaded))
    assert differ(a, b) == 0


def test_libraries_used_as_oracles_are_not_imported_by_the_program():
    import subprocess
    import sys

    code = (
        "import sys, sd.pipeline; print([m for m in ('transformers', 'diffusers', 'accelerate') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# ---- what people pass


def test_what_people_pass_works(tmp_path):
    pipe = shallow_pipeline()
    start = Image.linear_gradient("L").resize((16, 16))
    start.save(tmp_path / "a.png")
    draw = {"steps": 2, "height": 16, "width": 16}
    (plain,) = pipe.generate("x", seed=5, **draw)
    for seed in (np.int64(5), np.array([5]), torch.tensor(5), (5,), [np.uint8(5)]):
        assert pixels(pipe.generate("x", None, seed=seed, **draw)[0]).tolist() == pixels(plain).tolist()
    for prompts in (("a", "b"), iter(["a", "b"]), np.array(["a", "b"])):
        assert len(pipe.generate(prompts, seed=5, **draw)) == 2
    (from_picture,) = pipe.generate("x", seed=5, init_image=start, **draw)
    for given in (str(tmp_path / "a.png"), tmp_path / "a.png", start.convert("RGB"), [start], start.convert("LA")):
        assert np.abs(pixels(pipe.generate("x", seed=5, init_image=given, **draw)[0]) - pixels(from_picture)).max() <= 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": 3}, "prompt must be text, not int"),
        ({"prompt": ["a", None]}, "prompt must be text, not NoneType"),
        ({"prompt": "x", "negative_prompt": 3}, "negative_prompt must be text, not int"),
        ({"prompt": "x", "seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"prompt": "x", "seed": "5"}, "seed must be a whole number"),
        ({"prompt": "x", "init_image": 3}, "init_image must be a PIL image or a path, not int"),
        ({"prompt": "x", "init_image": "none.png"}, "none.png cannot be read as a picture"),
        ({"prompt": []}, "at least one prompt"),
    ],
)
def test_what_means_nothing_is_one_clear_error(given, message):
    with pytest.raises(ValueError, match=message):
        shallow_pipeline().generate(**given)

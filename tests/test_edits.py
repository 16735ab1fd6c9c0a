"""Masks beside diffusers' inpainting pipeline over a UNet of four channels."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image, ImageDraw

from bench.reference import oracles
from bench.reference.numbers import pixels
from bench.reference.oracles import diffusers_pipeline
from sd import edits, inference, optimizations
from sd.pictures.png import read_parameters
from tests.optimizations.stand_in import install
from tests.weights import tiny_pipeline

PROMPT, SIDE = "a red fox", 64


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def picture(width: int = SIDE, height: int = SIDE) -> Image.Image:
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)


def mask(width: int = SIDE, height: int = SIDE, box: tuple[int, int, int, int] = (16, 8, 47, 39)) -> Image.Image:
    found = Image.new("L", (width, height))
    ImageDraw.Draw(found).rectangle(box, fill=255)
    return found


def white(image: Image.Image) -> np.ndarray:
    return np.asarray(image)[..., None] >= 128


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(("sampler", "scheduler"), [("ddpm", oracles.ddpm_scheduler), ("ddim", oracles.ddim_scheduler)])
def test_against_diffusers(pipe, sampler, scheduler, strength):
    shared = {"mask": mask(), "init_image": picture(), "strength": strength, "sampler": sampler}
    (ours,) = pipe.generate(PROMPT, "blurry", 10, 7.5, 9, SIDE, SIDE, **shared)
    generator = torch.Generator().manual_seed(9)
    theirs = diffusers_pipeline(pipe, scheduler(), StableDiffusionInpaintPipeline)
    prepare = theirs.prepare_mask_latents

    def without_drawing(*args, **kwargs):
        """For UNets of nine channels it encodes the picture under the mask too, and draws noise for that."""
        state = generator.get_state()
        latents = prepare(*args, **kwargs)
        generator.set_state(state)
        return latents

    theirs.prepare_mask_latents = without_drawing
    expected = theirs(
        PROMPT,
        image=picture(),
        mask_image=mask(),
        strength=strength,
        negative_prompt="blurry",
        num_inference_steps=10,
        guidance_scale=7.5,
        height=SIDE,
        width=SIDE,
        generator=generator,
    ).images[0]
    drawn = white(mask())
    difference = np.abs(pixels(ours) - pixels(expected))
    assert (difference * drawn).max() <= 1
    assert np.array_equal(np.asarray(ours)[~drawn[..., 0]], np.asarray(picture())[~drawn[..., 0]])
    assert (np.abs(pixels(ours) - np.asarray(picture(), dtype=float)) * drawn).max() > 8, "it is repainted"


def test_masks_of_any_kind():
    expected = np.asarray(mask()) >= 128
    alpha = Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 0))
    alpha.paste((255, 255, 255, 255), (16, 8, 48, 40))
    for one in (mask(), mask().convert("RGB"), mask().convert("1"), alpha, mask().convert("P")):
        assert np.array_equal(np.asarray(edits.mask_of(one, SIDE, SIDE)) >= 128, expected), one.mode
    large = edits.mask_of(mask(2 * SIDE, 2 * SIDE, (32, 16, 95, 79)), SIDE, SIDE)
    assert np.array_equal(np.asarray(large) >= 128, expected)
    assert set(np.unique(np.asarray(large))) == {0, 255}


def test_blur_goes_over_to_what_stays():
    drawn, original = Image.new("RGB", (SIDE, SIDE), "white"), Image.new("RGB", (SIDE, SIDE))
    hard, soft = (np.asarray(edits.pasted([drawn], original, mask(), blur)[0])[24, :, 0] for blur in (0, 4))
    assert set(hard) == {0, 255}
    assert len(set(soft)) > 8
    assert soft[32] > 240
    assert soft[0] == 0


@pytest.mark.parametrize(
    "names", ["cuda-graph,async-noise", "loop-graph", "shared-halves,kv-cache,time-cache", "deepcache=1", "cpu"]
)
@pytest.mark.parametrize("sampler", ["ddpm", "unipc", "heun"])
def test_beside_optimizations(pipe, monkeypatch, names, sampler):
    if "graph" in names:
        install(monkeypatch)
    fast = tiny_pipeline()
    optimizations.apply(fast, names)
    draw = {"steps": 4, "seed": 5, "height": SIDE, "width": SIDE, "sampler": sampler}
    draw |= {"mask": mask(), "init_image": picture(), "strength": 0.9}
    a, b = (pixels(p.generate([PROMPT, "an owl"], **draw)) for p in (fast, pipe))
    assert np.abs(a - b).max() <= 1


def test_a_mask_without_a_picture(pipe):
    with pytest.raises(ValueError, match="a mask says which part of a picture is drawn anew: give init_image too"):
        pipe.generate(PROMPT, mask=mask())


# ---- the command


def test_the_command_draws_and_draws_again(tmp_path, tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture().save("start.png")
    mask().save("mask.png")
    shared = ["--ckpt", str(tiny_checkpoint), "--device", "cpu"]
    size = ["--height", str(SIDE), "--width", str(SIDE), "--steps", "2", "--seed", "1", *shared]
    files = ["--init-image", "start.png", "--mask", "mask.png", "--mask-blur", "2"]
    assert inference.main(["--prompt", "a fox", *size, *files, "--out", "a.png"]) == 0
    said = read_parameters(tmp_path / "a.png")
    assert (said["mask"], said["mask_blur"]) == ("mask.png", 2.0)
    assert inference.main(["--from-png", "a.png", *shared, "--out", "b.png"]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    capsys.readouterr()
    mask(box=(0, 0, 9, 9)).save("mask.png")
    assert inference.main(["--from-png", "a.png", *shared, "--out", "b.png"]) == 2
    assert "name that file with --mask" in capsys.readouterr().err
    assert inference.main(["--prompt", "a fox", *size, "--mask", "mask.png"]) == 2
    assert "init_image names that picture" in capsys.readouterr().err
    assert inference.main(["--prompt", "a fox", *size, "--init-image", "start.png", "--mask", "none.png"]) == 2
    assert "--mask: none.png cannot be read as a picture" in capsys.readouterr().err

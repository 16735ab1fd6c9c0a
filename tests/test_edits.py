"""Masks beside diffusers' inpainting pipeline over a UNet of four channels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file, save_file

from bench.reference import oracles
from bench.reference.numbers import pixels
from bench.reference.oracles import diffusers_pipeline
from sd import edits, inference, optimizations
from sd.pictures.png import read_parameters
from sd.pipeline import StableDiffusion
from tests.optimizations.stand_in import install
from tests.weights import tiny_pipeline

PROMPT, SIDE = "a red fox", 64


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def inpainting_pipe():
    return tiny_pipeline(unet={"in_channels": 9})


def picture(width: int = SIDE, height: int = SIDE) -> Image.Image:
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)


def mask(width: int = SIDE, height: int = SIDE, box: tuple[int, int, int, int] = (16, 8, 47, 39)) -> Image.Image:
    found = Image.new("L", (width, height))
    ImageDraw.Draw(found).rectangle(box, fill=255)
    return found


def white(image: Image.Image) -> np.ndarray:
    return np.asarray(image)[..., None] >= 128


def inpainted_by_diffusers(pipe, scheduler, image, shown, strength, **more):
    """Their pipeline's picture of 10 steps, seed 9."""
    generator = torch.Generator().manual_seed(9)
    theirs = diffusers_pipeline(pipe, scheduler, StableDiffusionInpaintPipeline)
    prepare = theirs.prepare_mask_latents

    def without_drawing(*args, **kwargs):
        """For UNets of nine channels it encodes the picture under the mask too, and draws noise for that."""
        state = generator.get_state()
        latents = prepare(*args, **kwargs)
        generator.set_state(state)
        return latents

    if not pipe.config.unet.inpaints:
        theirs.prepare_mask_latents = without_drawing
    return theirs(
        PROMPT,
        image=image,
        mask_image=shown,
        strength=strength,
        negative_prompt="blurry",
        num_inference_steps=10,
        guidance_scale=7.5,
        generator=generator,
        **{"height": SIDE, "width": SIDE, **more},
    ).images[0]


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(("sampler", "scheduler"), [("ddpm", oracles.ddpm_scheduler), ("ddim", oracles.ddim_scheduler)])
def test_against_diffusers(pipe, sampler, scheduler, strength):
    shared = {"mask": mask(), "init_image": picture(), "strength": strength, "sampler": sampler}
    (ours,) = pipe.generate(PROMPT, "blurry", 10, 7.5, 9, SIDE, SIDE, **shared)
    expected = inpainted_by_diffusers(pipe, scheduler(), picture(), mask(), strength)
    drawn = white(mask())
    difference = np.abs(pixels(ours) - pixels(expected))
    assert (difference * drawn).max() <= 1
    assert np.array_equal(np.asarray(ours)[~drawn[..., 0]], np.asarray(picture())[~drawn[..., 0]])
    assert (np.abs(pixels(ours) - np.asarray(picture(), dtype=float)) * drawn).max() > 8, "it is repainted"


def nearly(a, b) -> bool:
    """Where the encoder sees one gray, its norms divide rounding errors by next to nothing."""
    difference = np.abs(pixels(a) - pixels(b))
    return difference.max() <= 8 and difference.mean() < 0.5


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_model_that_was_trained_for_masks(inpainting_pipe, strength):
    pipe = inpainting_pipe
    shared = {"init_image": picture(), "strength": strength, "sampler": "ddim"}
    (ours,) = pipe.generate(PROMPT, "blurry", 10, 7.5, 9, SIDE, SIDE, mask=mask(), **shared)
    expected = inpainted_by_diffusers(pipe, oracles.ddim_scheduler(), picture(), mask(), strength)
    drawn = white(mask())
    assert (np.abs(pixels(ours) - pixels(expected)) * drawn).max() <= 1
    (whole,) = pipe.generate(PROMPT, "blurry", 10, 7.5, 9, SIDE, SIDE, **shared)
    all_white = Image.new("L", (SIDE, SIDE), 255)
    expected = inpainted_by_diffusers(pipe, oracles.ddim_scheduler(), picture(), all_white, strength)
    assert nearly(whole, expected), "without a mask all of it is drawn"


def test_an_inpainting_checkpoint_is_known_by_its_shapes(inpainting_pipe, tmp_path):
    """As published: in half precision, without a configuration."""
    inpainting_pipe.save(tmp_path / "a.safetensors")
    tensors = {name: tensor.half() for name, tensor in load_file(tmp_path / "a.safetensors").items()}
    save_file(tensors, tmp_path / "b.safetensors")
    pipe = StableDiffusion.load(tmp_path / "b.safetensors", "cpu")
    assert pipe.config.unet.inpaints
    draw = {"steps": 2, "seed": 5, "height": SIDE, "width": SIDE, "init_image": picture(), "mask": mask()}
    assert np.asarray(pipe.generate(PROMPT, **draw)[0]).std() > 8


@pytest.mark.parametrize(
    "names", ["loop-graph", "cuda-graph", "shared-halves,kv-cache,time-cache", "deepcache=1", "cpu"]
)
def test_a_model_that_was_trained_for_masks_beside_optimizations(inpainting_pipe, monkeypatch, names):
    if "graph" in names:
        install(monkeypatch)
    fast = tiny_pipeline(unet={"in_channels": 9})
    optimizations.apply(fast, names)
    draw = {"steps": 4, "height": SIDE, "width": SIDE, "init_image": picture(), "mask": mask(), "strength": 0.9}
    for seed in (5, 6):
        a, b = (pixels(p.generate([PROMPT, "an owl"], seed=seed, **draw)) for p in (fast, inpainting_pipe))
        assert np.abs(a - b).max() <= 1


def test_loop_graph_is_recorded_once_for_masks(monkeypatch, pipe):
    install(monkeypatch)
    fast = tiny_pipeline()
    optimizations.apply(fast, "loop-graph")
    draw = {"steps": 3, "height": SIDE, "width": SIDE, "strength": 0.9}
    cases = [(picture(), mask()), (ImageOps.invert(picture()), mask(box=(0, 0, 40, 20))), (picture(), None)]
    for image, shown in cases:
        a, b = (pixels(p.generate(PROMPT, seed=5, init_image=image, mask=shown, **draw)) for p in (fast, pipe))
        assert np.abs(a - b).max() <= 1
    assert fast.sample.recordings.captures == 2


def test_a_model_that_was_trained_for_masks_draws_from_noise(inpainting_pipe):
    (ours,) = inpainting_pipe.generate(PROMPT, "blurry", 10, 7.5, 9, SIDE, SIDE, sampler="ddim")
    gray, all_white = Image.new("RGB", (SIDE, SIDE), (128, 128, 128)), Image.new("L", (SIDE, SIDE), 255)
    expected = inpainted_by_diffusers(inpainting_pipe, oracles.ddim_scheduler(), gray, all_white, 1.0)
    assert nearly(ours, expected)


def test_only_the_masked_part_at_full_size(pipe):
    image, shown = picture(256, 192), mask(256, 192, (100, 60, 123, 91))
    shared = {"init_image": image, "mask": shown, "mask_padding": 8, "strength": 0.6, "sampler": "ddim"}
    (ours,) = pipe.generate(PROMPT, "blurry", 10, 7.5, 9, SIDE, SIDE, **shared)
    assert ours.size == image.size
    expected = inpainted_by_diffusers(
        pipe, oracles.ddim_scheduler(), image, shown, 0.6, padding_mask_crop=8, height=SIDE, width=SIDE
    )
    assert np.abs(pixels(ours) - pixels(expected)).max() <= 1
    assert np.array_equal(np.asarray(ours)[~white(shown)[..., 0]], np.asarray(image)[~white(shown)[..., 0]])


boxes = st.tuples(st.integers(0, 90), st.integers(0, 60), st.integers(1, 30), st.integers(1, 30))


@given(boxes, st.integers(0, 50), st.sampled_from([(64, 64), (64, 128), (192, 64)]))
@settings(deadline=None, max_examples=60)
def test_regions_are_those_of_diffusers(box, padding, size):
    left, top, width, height = box
    shown = mask(97, 71, (left, top, left + width - 1, top + height - 1))
    ours = edits.region_around(shown, padding, *size)
    if shown.getbbox():
        assert ours == VaeImageProcessor.get_crop_region(shown, size[1], size[0], padding)


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([(192, 704), (704, 192), (576, 448), (64, 192)]))
@example(15, 55, (704, 192))  # of which floats make a column less
@settings(deadline=None, max_examples=60)
def test_a_region_holds_all_that_is_white(width, height, size):
    shown = mask(400, 300, (100, 100, 99 + width, 99 + height))
    left, top, right, bottom = edits.region_around(shown, 0, *size)
    assert max(left, top) <= 100
    assert (right >= 100 + width, bottom >= 100 + height) == (True, True)


@pytest.mark.parametrize(
    ("size", "given_size", "drawn"),
    [
        ((64, 32), {"height": SIDE}, (2 * SIDE, SIDE)),
        ((64, 32), {"width": 2 * SIDE}, (2 * SIDE, SIDE)),
        ((64, 32), {"height": SIDE, "width": SIDE}, (SIDE, SIDE)),
        ((200, 2), {"width": 2 * SIDE}, (2 * SIDE, SIDE)),
    ],
)
def test_one_side_keeps_the_shape_of_the_picture(pipe, size, given_size, drawn):
    (image,) = pipe.generate(PROMPT, steps=1, init_image=picture(*size), **given_size)
    assert image.size == drawn


def test_padding_says_nothing_without_a_mask(pipe):
    draw = {"steps": 2, "seed": 3, "init_image": picture(2 * SIDE, SIDE // 2)}
    (with_it,), (without,) = pipe.generate(PROMPT, mask_padding=8, **draw), pipe.generate(PROMPT, **draw)
    assert np.array_equal(pixels([with_it]), pixels([without]))
    assert with_it.info == without.info


def test_an_inverted_mask(pipe):
    draw = {"steps": 3, "seed": 5, "height": SIDE, "width": SIDE, "init_image": picture()}
    ours = pipe.generate(PROMPT, mask=mask(), mask_invert=True, **draw)
    assert np.array_equal(pixels(ours), pixels(pipe.generate(PROMPT, mask=ImageOps.invert(mask()), **draw)))
    assert ours[0].info["mask_invert"] is True


@pytest.mark.parametrize("more", [(24, 0, 40, 64), (0, 0, 21, 3)])
def test_a_picture_grows(pipe, more):
    """As a picture that was made larger by hand, with all that is new under the mask."""
    left, top, right, bottom = more
    small = picture(40, 50)
    (ours,) = pipe.generate(PROMPT, "blurry", 4, 7.5, 9, init_image=small, outpaint=more, sampler="ddim")
    width, height = 40 + left + right, 50 + top + bottom
    assert ours.size == (width, height)
    assert np.array_equal(np.asarray(ours)[top : top + 50, left : left + 40], np.asarray(small)), "it stays as it is"
    assert ours.info["outpaint"] == ",".join(map(str, more))
    across, down = -(-width // 64) * 64, -(-height // 64) * 64
    margins = (left, across - left - 40, top, down - top - 50)
    rows = torch.from_numpy(np.asarray(small, dtype=np.float32)).permute(2, 0, 1)
    padded = torch.nn.functional.pad(rows[None], margins, mode="replicate")[0].permute(1, 2, 0)
    canvas = Image.fromarray(padded.numpy().astype("uint8"))
    shown = Image.new("L", (across, down), 255)
    shown.paste(0, (left, top, left + 40, top + 50))
    (by_hand,) = pipe.generate(PROMPT, "blurry", 4, 7.5, 9, down, across, init_image=canvas, mask=shown, sampler="ddim")
    assert np.array_equal(pixels(ours), pixels(by_hand)[:height, :width])


def test_a_picture_grows_and_a_part_of_it_is_drawn_anew(pipe):
    small, hole = picture(40, 48), mask(40, 48, (8, 8, 20, 20))
    shared = {"steps": 2, "seed": 5, "init_image": small, "outpaint": (24, 0, 0, 0)}
    (ours,) = pipe.generate(PROMPT, mask=hole, **shared)
    (inverted,) = pipe.generate(PROMPT, mask=ImageOps.invert(hole), mask_invert=True, **shared)
    assert np.array_equal(np.asarray(ours), np.asarray(inverted))
    kept = (np.asarray(ours)[:, 24:] == np.asarray(small)).all(-1)
    assert kept[~white(hole)[..., 0]].all()
    assert kept[white(hole)[..., 0]].mean() < 0.1
    with pytest.raises(ValueError, match="mask_padding draws a part of a picture, and outpaint what is around it"):
        pipe.generate(PROMPT, mask=hole, mask_padding=4, **shared)
    with pytest.raises(ValueError, match="pictures that grow together must be of one size"):
        pipe.generate([PROMPT] * 2, **{**shared, "init_image": [small, picture(48, 48)]})


def test_one_picture_under_several_masks(pipe):
    masks = [mask(), mask(box=(0, 0, 31, 63))]
    draw = {"steps": 3, "height": SIDE, "width": SIDE, "init_image": picture()}
    both = pipe.generate(PROMPT, seed=[1, 2], mask=masks, **draw)
    for i, shown in enumerate(masks):
        (alone,) = pipe.generate(PROMPT, seed=i + 1, mask=shown, **draw)
        assert np.abs(pixels(both[i]) - pixels(alone)).max() <= 1


def test_a_larger_picture_against_diffusers():
    pipe = tiny_pipeline(image_size=2 * SIDE)  # none is coded in tiles
    (ours,) = pipe.generate(PROMPT, "blurry", 10, 7.5, 9, SIDE, SIDE, sampler="ddim", hires=2, hires_strength=0.6)
    scheduler = oracles.ddim_scheduler()
    shared = {"negative_prompt": "blurry", "num_inference_steps": 10, "guidance_scale": 7.5}
    seeded = lambda: torch.Generator().manual_seed(9)  # noqa: E731
    first = diffusers_pipeline(pipe, scheduler, StableDiffusionPipeline)
    small = first(PROMPT, height=SIDE, width=SIDE, generator=seeded(), **shared).images[0]
    again = diffusers_pipeline(pipe, scheduler, StableDiffusionImg2ImgPipeline)
    image = small.resize((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    expected = again(PROMPT, image=image, strength=0.6, generator=seeded(), **shared).images[0]
    assert ours.size == (2 * SIDE, 2 * SIDE)
    assert np.abs(pixels(ours) - pixels(expected)).max() <= 1


def test_large_pictures_are_coded_in_tiles(pipe, monkeypatch):
    """What is over the size that the model was trained at."""
    sizes = []
    for name in ("encode", "decode"):
        real = getattr(pipe.vae, name)
        monkeypatch.setattr(pipe.vae, name, lambda x, real=real: sizes.append(max(x.shape[-2:])) or real(x))
    side = pipe.config.image_size
    pipe.generate(PROMPT, steps=2, seed=1, hires=2)
    assert set(sizes) == {side, side // 8}
    assert len(sizes) > 2


def test_a_picture_for_each_of_a_batch(pipe):
    images, masks = [picture(), ImageOps.invert(picture())], [mask(), mask(box=(0, 0, 31, 63))]
    draw = {"steps": 4, "height": SIDE, "width": SIDE}
    both = pipe.generate([PROMPT, "an owl"], seed=[1, 2], init_image=images, mask=masks, **draw)
    for i, prompt in enumerate([PROMPT, "an owl"]):
        alone = pipe.generate(prompt, seed=i + 1, init_image=images[i], mask=masks[i], **draw)
        assert np.abs(pixels(both[i]) - pixels(alone)).max() <= 1
    with pytest.raises(ValueError, match="init_image are 2, for 3 pictures"):
        pipe.generate([PROMPT] * 3, init_image=images)


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
    edit = edits.edit(original, SIDE, SIDE, mask())
    hard, soft = (np.asarray(replace(edit, blur=blur).finished(drawn))[24, :, 0] for blur in (0, 4))
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
    with pytest.raises(ValueError, match="outpaint says how a picture grows: give init_image too"):
        pipe.generate(PROMPT, outpaint=(1, 0, 0, 0))
    with pytest.raises(ValueError, match="outpaint must be pixels to the left, top, right and bottom"):
        pipe.generate(PROMPT, init_image=picture(), outpaint="1,2")
    with pytest.raises(ValueError, match="hires draws all of a picture again"):
        pipe.generate(PROMPT, init_image=picture(), mask=mask(), hires=2)
    with pytest.raises(ValueError, match="the mask is black all over"):
        pipe.generate(PROMPT, init_image=picture(), mask=Image.new("L", (8, 8)), mask_padding=1)


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
    assert "it needs init_image, that picture" in capsys.readouterr().err
    assert inference.main(["--prompt", "a fox", *size, "--init-image", "start.png", "--mask", "none.png"]) == 2
    assert "--mask: none.png cannot be read as a picture" in capsys.readouterr().err

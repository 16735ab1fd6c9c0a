"""The demo model in data/demo: the files as they were shipped, and pictures that answer their prompts."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd import pipeline
from sd.pipeline import DEMO_CHECKPOINT, StableDiffusion, find_checkpoint
from train.checkers import background_colour, dominant_colour

FOLDER = DEMO_CHECKPOINT.parent
SUMS = FOLDER / "SHA256SUMS"
MAX_BYTES, MAX_FILE_BYTES = 30_000_000, 16_000_000
# Prompt, colour of the thing or of the background. Chance would answer one or two.
COLOURS = {"a red car": "red", "a blue dog": "blue", "a green cat": "green", "a purple house": "purple"}
BACKGROUNDS = {
    "a dog on a yellow background": "yellow",
    "a cat on a blue background": "blue",
    "a car on a green background": "green",
    "an apple on a black background": "black",
}
STEPS, MISSES = 8, 2

pytestmark = pytest.mark.skipif(not DEMO_CHECKPOINT.exists(), reason="data/demo holds no checkpoint")


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return StableDiffusion.load(DEMO_CHECKPOINT, "cpu")


def shipped() -> dict[str, str]:
    """sha256 by file name."""
    return {name: digest for digest, name in (line.split() for line in SUMS.read_text().splitlines())}


def test_the_files_are_those_that_were_shipped():
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in FOLDER.glob("sd-demo*")}
    assert found == shipped()


def test_the_files_are_small():
    sizes = [(FOLDER / name).stat().st_size for name in shipped()]
    assert sum(sizes) <= MAX_BYTES
    assert max(sizes) <= MAX_FILE_BYTES


def test_it_loads_strictly_and_draws_128_pixels(pipe):
    assert pipe.config.image_size == 128
    assert all(parameter.isfinite().all() for parameter in pipe.unet.parameters())


def test_pictures_have_the_colours_of_their_prompts(pipe):
    prompts = [*COLOURS, *BACKGROUNDS]
    pictures = pipe.generate(prompts, steps=STEPS, cfg_scale=5, seed=0, sampler="ddim")
    judges = [dominant_colour] * len(COLOURS) + [background_colour] * len(BACKGROUNDS)
    seen = [judge(np.asarray(picture)) for judge, picture in zip(judges, pictures, strict=True)]
    wanted = [*COLOURS.values(), *BACKGROUNDS.values()]
    assert sum(a != b for a, b in zip(seen, wanted, strict=True)) <= MISSES, dict(zip(prompts, seen, strict=True))


def test_one_seed_gives_the_same_bytes_and_another_does_not(pipe):
    first, again, other = (
        pipe.generate("a fox", steps=2, seed=seed, sampler="ddim")[0].tobytes() for seed in (7, 7, 8)
    )
    assert first == again
    assert first != other


def test_any_size(pipe):
    (picture,) = pipe.generate("a cat", steps=2, seed=0, height=128, width=192)
    assert picture.size == (192, 128)


def test_image_to_image_keeps_what_is_not_noised(pipe):
    init = Image.new("RGB", (128, 128), "blue")
    (picture,) = pipe.generate("a cat", steps=10, seed=0, sampler="ddim", init_image=init, strength=0.1, cfg_scale=1)
    assert picture.size == init.size
    assert background_colour(np.asarray(picture)) == "blue"


def test_which_checkpoint_is_used_when_none_is_named(tmp_path, monkeypatch):
    """$SD_CKPT, then SD 1.5 in data/ (safetensors before ckpt), then the demo model."""
    monkeypatch.setattr(pipeline, "DATA", tmp_path)
    monkeypatch.delenv("SD_CKPT", raising=False)
    assert find_checkpoint() == DEMO_CHECKPOINT
    for suffix in ("ckpt", "safetensors"):
        path = tmp_path / f"v1-5-pruned-emaonly.{suffix}"
        path.touch()
        assert find_checkpoint() == path
    monkeypatch.setitem(os.environ, "SD_CKPT", "elsewhere.safetensors")
    assert find_checkpoint() == Path("elsewhere.safetensors")

"""What people pass to `generate`: numpy's and torch's numbers, whole floats, paths, pictures of any mode; or one clear
error."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from sd.pipeline import StableDiffusion
from tests.weights import shallow_pipeline

START, MASK = Image.new("RGB", (96, 64), "red"), Image.new("L", (96, 64), 255)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return shallow_pipeline()


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"steps": 2.0}, {"steps": 2}),
        ({"steps": np.int32(2)}, {"steps": 2}),
        ({"steps": torch.tensor(2)}, {"steps": 2}),
        ({"cfg_scale": np.float32(3)}, {"cfg_scale": 3.0}),
        ({"cfg_scale": 3}, {"cfg_scale": 3.0}),
        ({"height": 128.0, "width": np.float64(64)}, {"height": 128, "width": 64}),
        ({"seed": 5.0}, {"seed": 5}),
        ({"seed": [np.uint8(5)]}, {"seed": 5}),
        ({"clip_skip": np.float64(1)}, {"clip_skip": 1}),
        ({"sampler": "ddim", "eta": np.float32(0.5)}, {"sampler": "ddim", "eta": 0.5}),
        ({"init_image": START, "strength": np.float64(0.5)}, {"init_image": START, "strength": 0.5}),
        (
            {"init_image": START, "mask": MASK, "mask_blur": np.int64(2), "mask_padding": 8.0},
            {"init_image": START, "mask": MASK, "mask_blur": 2.0, "mask_padding": 8},
        ),
        ({"negative_prompt": None}, {}),
        ({"prompt": ("a fox",)}, {}),
        ({"prompt": np.array(["a fox"])}, {}),
    ],
)
def test_numbers_of_any_library(pipe, given, plain):
    common = {"prompt": "a fox", "steps": 1, "seed": 3}
    (a,), (b,) = (pipe.generate(**{**common, **own}) for own in (given, plain))
    assert a.tobytes() == b.tobytes()
    assert a.info == b.info
    assert all(type(value) in (int, float, str) for value in a.info.values()), "a PNG can hold it"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 2.5}, "steps must be a whole number, not 2.5"),
        ({"steps": "2"}, "steps must be a whole number, not '2'"),
        ({"steps": True}, "steps must be a whole number, not True"),
        ({"seed": True}, "seed must be a whole number, not True"),
        ({"seed": "12"}, "seed must be a whole number, not '12'"),
        ({"seed": [1.5]}, "seed must be a whole number, not 1.5"),
        ({"height": 64.5}, "height must be a whole number, not 64.5"),
        ({"cfg_scale": "7"}, "cfg_scale must be a finite number, not '7'"),
        ({"cfg_scale": float("nan")}, "cfg_scale must be a finite number, not nan"),
        ({"cfg_scale": 10**400}, "cfg_scale must be a finite number, not 1000"),
        ({"strength": None, "init_image": START}, "strength"),
        ({"hires": "2"}, "hires must be a finite number, not '2'"),
        ({"hires": np.inf}, "hires must be a finite number"),
        ({"sampler": 3}, "sampler must be text, not int"),
        ({"schedule": 3}, "schedule must be text, not int"),
        ({"prompt_syntax": 3}, "no prompt syntax 3; there are"),
        ({"control": "canny.pth:photo.jpg"}, "control must be a list of Control, not of str"),
        ({"init_image": np.zeros((8, 8, 3))}, "init_image must be a PIL image or a path, not ndarray"),
        ({"init_image": "missing.png"}, "missing.png cannot be read as a picture"),
        ({"prompt": 3}, "prompt must be text, not int"),
    ],
)
def test_what_cannot_be_is_one_clear_error(pipe, given, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        pipe.generate(**{"prompt": "a fox", "steps": 1, **given})
    assert "\n" not in str(caught.value)


MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
)


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_any_mode(pipe, mode, tmp_path):
    assert pipe.generate("a fox", steps=2, seed=1, sampler="ddim", init_image=Image.new(mode, (64, 64)))


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_paths(pipe, kind, tmp_path):
    START.save(tmp_path / "a.png")
    draw = {"steps": 2, "seed": 1, "sampler": "ddim"}
    (a,) = pipe.generate("a fox", **draw, init_image=START)
    (b,) = pipe.generate("a fox", **draw, init_image=kind(tmp_path / "a.png"))
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampler": "ddim", "eta": 1.5}, "eta must be from 0 to 1, not 1.5"),
        ({"sampler": "tcd", "eta": -0.5}, "eta must be from 0 to 1, not -0.5"),
        ({"sampler": "euler_a", "s_noise": 11}, "s_noise must be from 0 to 10, not 11"),
        (
            {"init_image": Image.new("RGB", (64, 64)), "latents": torch.zeros(1, 4, 8, 8)},
            "give them without init_image",
        ),
    ],
)
def test_what_would_be_noise_or_not_used_is_refused(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        pipe.generate("x", steps=2, **given)

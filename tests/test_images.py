"""Pictures of every kind in, whole PNGs out."""

import numpy as np
import pytest
import torch
from PIL import Image

from sd.images import from_pil, read_parameters, save_png, to_pil, to_rgb


def test_bytes_are_rounded_and_clamped():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, 2 * 100.6 / 255 - 1])
    images = values.expand(1, 3, 1, 6)
    assert np.asarray(to_pil(images)[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255, 101]


def test_from_pil_is_the_inverse_of_to_pil():
    array = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(to_pil(from_pil(Image.fromarray(array), 8, 6))[0]), array)


def test_other_sizes_are_resized():
    assert from_pil(Image.new("RGB", (100, 50), "red"), 16, 32).shape == (1, 3, 16, 32)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F", "HSV", "LAB"])
def test_every_mode_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (4, 4))).mode == "RGB"


def test_transparency_is_put_on_white():
    assert to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1))
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped():
    image = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 128, 255]


def test_exif_rotation():
    image = Image.new("RGB", (4, 2))
    image.getexif()[0x0112] = 6
    assert to_rgb(image).size == (2, 4)


def test_parameters_survive_the_file(tmp_path):
    parameters = {"prompt": 'ein Füchslein 🦊\n"x"', "steps": 50, "cfg_scale": 7.5}
    save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", parameters)
    assert read_parameters(tmp_path / "a.png") == parameters


def test_a_picture_of_somebody_else_has_none(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="no parameters"):
        read_parameters(tmp_path / "b.png")


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(AttributeError):
        save_png(None, tmp_path / "c.png", {})
    assert list(tmp_path.iterdir()) == []


def test_a_whole_file_stays_when_its_replacement_fails(tmp_path):
    save_png(Image.new("RGB", (2, 2), "red"), tmp_path / "d.png", {"prompt": ""})
    with pytest.raises(AttributeError):
        save_png(None, tmp_path / "d.png", {})
    assert Image.open(tmp_path / "d.png").getpixel((0, 0)) == (255, 0, 0)

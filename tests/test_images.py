"""Pictures of every kind in, and between tensors and PIL."""

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sd.images import from_pil, read_rgb, size_of_file, to_pil, to_rgb


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


# ---- real files of every kind

RAMP = np.linspace(0, 1, 64).reshape(8, 8)
"""What each file shows, 0 black and 1 white: the first pixel is black, the last white."""


def gray8() -> Image.Image:
    return Image.fromarray((RAMP * 255).round().astype("uint8"))


def gray16() -> Image.Image:
    return Image.fromarray((RAMP * 65535).round().astype("uint16"))


def png16(path: Path, array: np.ndarray) -> None:
    """A 16-bit PNG of 1, 2, 3 or 4 channels, [H, W, C], by hand: Pillow writes only gray ones."""
    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def wide(*extra: np.ndarray) -> np.ndarray:
    return (np.stack([RAMP, *extra], axis=-1) * 65535).round()


FILES = {
    "8-bit gray.png": lambda path: gray8().save(path),
    "16-bit gray.png": lambda path: gray16().save(path),
    "16-bit gray and alpha.png": lambda path: png16(path, wide(np.ones((8, 8)))),
    "16-bit.png": lambda path: png16(path, wide(RAMP, RAMP)),
    "16-bit and alpha.png": lambda path: png16(path, wide(RAMP, RAMP, np.ones((8, 8)))),
    "palette.png": lambda path: gray8().convert("P").save(path),
    "alpha.png": lambda path: gray8().convert("RGBA").save(path),
    "16-bit.tiff": lambda path: gray16().save(path),
    "32-bit.tiff": lambda path: Image.fromarray((RAMP * 65535).astype("int32")).save(path),
    "float.tiff": lambda path: Image.fromarray(RAMP.astype("float32")).save(path),
    "lzw.tiff": lambda path: gray8().convert("RGB").save(path, compression="tiff_lzw"),
    "cmyk.tiff": lambda path: gray8().convert("CMYK").save(path),
    "plain.gif": lambda path: gray8().save(path),
    "animated.gif": lambda path: gray8().save(path, save_all=True, append_images=[Image.new("L", (8, 8))]),
    "lossless.webp": lambda path: gray8().convert("RGB").save(path, lossless=True),
    "alpha.webp": lambda path: gray8().convert("RGBA").save(path, lossless=True),
    "plain.bmp": lambda path: gray8().convert("RGB").save(path),
    "gray.jpg": lambda path: gray8().resize((64, 64), 0).save(path, quality=100),
    "progressive.jpg": lambda path: gray8().resize((64, 64), 0).save(path, quality=100, progressive=True),
    "cmyk.jpg": lambda path: gray8().resize((64, 64), 0).convert("CMYK").save(path, quality=100),
    "wide.ppm": lambda path: path.write_bytes(b"P5 8 8 65535 " + (RAMP * 65535).round().astype(">u2").tobytes()),
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name):
    FILES[name](tmp_path / name)
    image = read_rgb(tmp_path / name)
    assert image.mode == "RGB"
    seen = np.asarray(image.resize((8, 8), Image.Resampling.BOX)).astype(float) / 255
    assert np.abs(seen - RAMP[..., None]).max() < (0.02 if name.endswith(".jpg") else 0.005)


def test_a_one_bit_file(tmp_path):
    gray8().point(lambda value: 255 * (value > 127), "1").save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.png"))[..., 0] > 0, RAMP > 0.5)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.gif", "gray.png", "a.tiff"])
def test_transparent_files_are_put_on_white(tmp_path, name):
    image = Image.new("LA" if name == "gray.png" else "RGBA", (8, 8))
    image.paste((0, 255) if name == "gray.png" else (255, 0, 0, 255), (0, 0, 4, 8))
    image.save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    seen = read_rgb(tmp_path / name)
    assert seen.getpixel((7, 7)) == (255, 255, 255)
    assert seen.getpixel((0, 0)) == ((0, 0, 0) if name == "gray.png" else (255, 0, 0))


def test_a_dark_sixteen_bit_file_stays_dark(tmp_path):
    Image.fromarray(np.full((8, 8), 200, dtype=np.uint16)).save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png").getpixel((0, 0)) == (1, 1, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
def test_files_lying_on_their_side(tmp_path, name, orientation):
    upright = np.zeros((24, 48, 3), dtype=np.uint8)
    upright[:12, :24, 0] = upright[:12, 24:, 1] = upright[12:, :24, 2] = 255
    turns = {1: "", 2: "h", 3: "hv", 4: "v", 5: "t", 6: "tv", 7: "hvt", 8: "th"}[orientation]
    stored = upright
    for turn in turns:
        stored = {"h": stored[:, ::-1], "v": stored[::-1], "t": stored.transpose(1, 0, 2)}[turn]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"a.jpg": {"quality": 100, "subsampling": 0}, "a.webp": {"lossless": True}}.get(name, {})
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / name, exif=exif, **options)
    image = read_rgb(tmp_path / name)
    assert image.size == (48, 24)
    assert np.abs(np.asarray(image).astype(int) - upright).mean() < 3


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "evil.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n%%EOF\n")
    for name in ("text.png", "empty.png", "evil.eps", "missing.png", ""):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a picture"):
            read_rgb(tmp_path / name)


@pytest.mark.parametrize("name", ["16-bit.png", "lzw.tiff", "plain.gif", "alpha.webp", "gray.jpg", "plain.bmp"])
def test_damaged_files_are_pictures_or_one_kind_of_error(tmp_path, name):
    path = tmp_path / name
    FILES[name](path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        data = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(min(len(data), rng.randrange(4))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        assert outcome(path) in ("RGB", f"{path} cannot be read as a picture")


def outcome(path: Path) -> str:
    try:
        return read_rgb(path).mode
    except ValueError as error:
        return str(error).split(" (")[0]


def test_a_size_is_read_from_the_head_alone(tmp_path):
    """Of a file whose pixels are cut off, too."""
    image = Image.effect_noise((64, 32), 50)
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.jpg", exif=turned)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:400])
    assert size_of_file(tmp_path / "a.png") == (64, 32)
    assert size_of_file(tmp_path / "b.jpg") == (32, 64)
    assert size_of_file(tmp_path / "none.png") is None

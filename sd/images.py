"""Pictures between tensors, PIL and files. torch is imported only by what makes a tensor: reading files needs none."""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "ICO", "AVIF", "JPEG2000")
"""What `read_rgb` opens. Not EPS, for which Pillow would run Ghostscript on the file."""


MOST_CHUNKS, MOST_CHUNKS_OF_DATA = 2_000, 1_000_000
LARGEST_CHUNK, LARGEST_CHUNKS = 16 << 20, 64 << 20
"""Chunks of a PNG that hold something else than pixels, and those of pixels; bytes of one of the former, and of all."""

_PIXELS = (b"IDAT", b"fdAT", b"fcTL")


@contextmanager
def opened(path: str | os.PathLike | BinaryIO, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """The picture in a file, by its name or open, not decoded yet. Raises OSError, ValueError or what its decoder
    stumbles over.

    Pipes and devices are refused, which may have no end, and a PNG whose texts would fill the memory.
    """
    if hasattr(path, "read"):
        _check_chunks(path)
        path.seek(0)
    else:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
        with open(path, "rb") as file:
            _check_chunks(file)
    try:
        image = Image.open(path, formats=formats)
    except Image.DecompressionBombError as error:  # which is neither
        raise ValueError(f"{path} claims too many pixels: {error}") from None
    with image:
        yield image


def _check_chunks(file: BinaryIO) -> None:
    """By the lengths alone that a PNG's chunks begin with. Raises ValueError."""
    count = pixels = size = 0
    if file.read(8) != b"\x89PNG\r\n\x1a\n":
        return
    name = getattr(file, "name", "the picture")
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind in _PIXELS:
            pixels += 1
        else:
            count, size = count + 1, size + length
        if length > LARGEST_CHUNK and kind not in _PIXELS:
            raise ValueError(f"{name} has a chunk of {length >> 20} MB beside its pixels")
        if count > MOST_CHUNKS or size > LARGEST_CHUNKS or pixels > MOST_CHUNKS_OF_DATA:
            raise ValueError(f"{name} has over {count + pixels - 1} chunks, with {size >> 20} MB beside its pixels")
        file.seek(length + 4, os.SEEK_CUR)


def to_pil(images: "Tensor") -> list[Image.Image]:
    """Pictures [B, 3, H, W] in [-1, 1] (anything outside is clamped) -> B PIL images. Rounded, not truncated."""
    images = (images.float() / 2 + 0.5).clamp(0, 1)
    array = (images.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype("uint8")
    return [Image.fromarray(picture) for picture in array]


def read_rgb(path: str | os.PathLike) -> Image.Image:
    """The picture in a file, of an animation the first, as `to_rgb` gives it. Raises ValueError, naming the file."""
    with _naming(path), opened(path) as image:
        return to_rgb(image)


def read(path: str | os.PathLike) -> Image.Image:
    """The picture in a file as it is, transparency too. Raises ValueError, naming the file."""
    with _naming(path), opened(path) as image:
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """The picture decoded, turned as its EXIF says."""
    image.load()
    return ImageOps.exif_transpose(image)


def size_of_file(path: str | os.PathLike) -> tuple[int, int] | None:
    """Width and height, upright, from the head of the file; None for what is no picture."""
    try:
        with opened(path) as image:
            width, height = image.size
            exif = Image.Image.getexif(image)  # a PNG's own would decode its pixels to look behind them
            return (height, width) if exif.get(0x0112, 1) in (5, 6, 7, 8) else (width, height)
    except Exception:  # decoders raise whatever they stumble over
        return None


def check_whole(path: str | os.PathLike) -> None:
    """Raise ValueError, naming the file, unless all of its pixels can be decoded."""
    with _naming(path), opened(path) as image:
        image.load()


def check_readable(path: str | os.PathLike) -> None:
    """Raise ValueError, naming the file, unless it begins as `read_rgb` expects; the pixels are not decoded."""
    with _naming(path), opened(path):
        pass


@contextmanager
def _naming(path: str | os.PathLike) -> Iterator[None]:
    """On damaged files, decoders raise whatever they stumble over."""
    try:
        yield
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be read as a picture ({reason})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture that Pillow reads as 8-bit RGB: upright (EXIF), transparency on white, 16 bits scaled down."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "La":  # with premultiplied transparency; Pillow itself turns RGBa into RGB
        image = image.convert("LA")
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Wide grays as 8-bit ones. "I;16" says how wide; the range of "I" and "F" is the least usual one that holds it."""
    array = np.nan_to_num(np.asarray(image, dtype=np.float64))
    ranges = {"I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    full = next((full for full in ranges if array.max(initial=0) <= full), ranges[-1])
    return Image.fromarray((array.clip(0, full) / full * 255).round().astype("uint8"))


def resized(image: Image.Image, height: int, width: int) -> Image.Image:
    """At this size, by Lanczos where it has another."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def from_pil(image: Image.Image, height: int, width: int) -> "Tensor":
    """A picture of any size and mode -> [1, 3, height, width] in [-1, 1], resized (Lanczos) if need be."""
    import torch

    image = resized(to_rgb(image), height, width)
    array = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(array).permute(2, 0, 1)[None] * 2 - 1

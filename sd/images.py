"""Pictures between tensors, PIL and files. torch is imported only by what makes a tensor: reading files needs none."""

import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "ICO", "AVIF", "JPEG2000")
"""What `read_rgb` opens. Not EPS, for which Pillow would run Ghostscript on the file."""


def to_pil(images: "Tensor") -> list[Image.Image]:
    """Pictures [B, 3, H, W] in [-1, 1] (anything outside is clamped) -> B PIL images. Rounded, not truncated."""
    images = (images.float() / 2 + 0.5).clamp(0, 1)
    array = (images.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype("uint8")
    return [Image.fromarray(picture) for picture in array]


def read_rgb(path: str | os.PathLike) -> Image.Image:
    """The picture in a file, of an animation the first, as `to_rgb` gives it. Raises ValueError, naming the file."""
    with _naming(path), Image.open(path, formats=FORMATS) as image:
        return to_rgb(image)


def check_readable(path: str | os.PathLike) -> None:
    """Raise ValueError, naming the file, unless it begins as `read_rgb` expects; the pixels are not decoded."""
    with _naming(path), Image.open(path, formats=FORMATS):
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


def from_pil(image: Image.Image, height: int, width: int) -> "Tensor":
    """A picture of any size and mode -> [1, 3, height, width] in [-1, 1], resized (Lanczos) if need be."""
    import torch

    image = to_rgb(image)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    array = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(array).permute(2, 0, 1)[None] * 2 - 1


def save_png(image: Image.Image, path: str | os.PathLike, parameters: Mapping[str, object]) -> None:
    """Write a PNG whose text chunks hold the parameters, one a chunk, each value as JSON.

    The file appears whole or not at all: it is written beside its place and renamed. Raises OSError.
    """
    path = Path(path)
    data = to_png(image, parameters)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def to_png(image: Image.Image, parameters: Mapping[str, object]) -> bytes:
    """A PNG file whose text chunks hold the parameters, as `save_png` writes it."""
    text = PngImagePlugin.PngInfo()
    for key, value in parameters.items():
        text.add_itxt(key, json.dumps(value, ensure_ascii=False))
    data = io.BytesIO()
    image.save(data, format="PNG", pnginfo=text)
    return data.getvalue()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_parameters(path: str | os.PathLike) -> dict[str, object]:
    """The parameters that `save_png` wrote into a PNG. Raises OSError if it is no PNG, ValueError without any.

    Only the head of the file is read: the pixels are not decoded.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            parameters = {key: json.loads(value) for key, value in image.info.items() if isinstance(value, str)}
    except (SyntaxError, ValueError, RecursionError, Image.DecompressionBombError):
        parameters = {}
    if "prompt" not in parameters:
        raise ValueError(f"{path} holds no parameters of a picture drawn by this program")
    return parameters

"""Pictures between tensors, PIL and files."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pictures [B, 3, H, W] in [-1, 1] (anything outside is clamped) -> B PIL images. Rounded, not truncated."""
    images = (images.float() / 2 + 0.5).clamp(0, 1)
    array = (images.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype("uint8")
    return [Image.fromarray(picture) for picture in array]


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture that Pillow reads as 8-bit RGB: upright (EXIF), transparency on white, 16 bits scaled down."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    array = np.asarray(image, dtype=np.float64)
    full = 65535.0 if array.max(initial=0) > 255 else 255.0
    return Image.fromarray((array.clip(0, full) / full * 255).round().astype("uint8"))


def from_pil(image: Image.Image, height: int, width: int) -> Tensor:
    """A picture of any size and mode -> [1, 3, height, width] in [-1, 1], resized (Lanczos) if need be."""
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
    text = PngImagePlugin.PngInfo()
    for key, value in parameters.items():
        text.add_itxt(key, json.dumps(value, ensure_ascii=False))
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            image.save(file, format="PNG", pnginfo=text)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_parameters(path: str | os.PathLike) -> dict[str, object]:
    """The parameters that `save_png` wrote into a PNG. Raises OSError if it is no picture, ValueError without any."""
    with Image.open(path) as image:
        image.load()
        chunks = dict(getattr(image, "text", {}))
    try:
        parameters = {key: json.loads(value) for key, value in chunks.items()}
    except json.JSONDecodeError:
        parameters = {}
    if "prompt" not in parameters:
        raise ValueError(f"{path} holds no parameters of a picture drawn by this program")
    return parameters

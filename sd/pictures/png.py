"""PNG files that say how they were drawn: a text chunk a parameter, its value as JSON. Needs no torch."""

import io
import json
import os
from collections.abc import Mapping
from typing import BinaryIO

from PIL import Image, PngImagePlugin

from sd.images import opened
from sd.pictures import a1111
from sd.writing import write_whole

FOREIGN = "parameters"


def save_png(image: Image.Image, path: str | os.PathLike, parameters: Mapping[str, object]) -> None:
    """Write `to_png` of the picture: the file appears whole or not at all. Raises OSError."""
    write_whole(path, to_png(image, parameters))


def to_png(image: Image.Image, parameters: Mapping[str, object]) -> bytes:
    """A PNG file whose text chunks hold the parameters, one a chunk, each value as JSON.

    A chunk `parameters` says them as AUTOMATIC1111's web UI does.
    """
    text = PngImagePlugin.PngInfo()
    for key, value in parameters.items():
        text.add_itxt(key, json.dumps(value, ensure_ascii=False))
    if "prompt" in parameters:
        text.add_text(FOREIGN, a1111.written(parameters))
    data = io.BytesIO()
    image.save(data, format="PNG", pnginfo=text)
    return data.getvalue()


def read_parameters(path: str | os.PathLike | BinaryIO) -> dict[str, object]:
    """The parameters that `save_png` wrote into a PNG. Raises OSError if it is no PNG, ValueError without any.

    Only the head of the file is read: the pixels are not decoded.
    """
    try:
        with opened(path, ["PNG"]) as image:
            texts = {key: value for key, value in image.info.items() if isinstance(value, str) and key != FOREIGN}
            parameters = {key: json.loads(value) for key, value in texts.items()}
    except (SyntaxError, ValueError, RecursionError, Image.DecompressionBombError):
        parameters = {}
    if "prompt" not in parameters:
        raise ValueError(f"{path} holds no parameters of a picture drawn by this program")
    return parameters

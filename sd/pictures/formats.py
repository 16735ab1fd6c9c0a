"""Picture files that say how they were drawn: PNG in text chunks, JPEG and WebP in EXIF. Needs no torch.

PNG (png.py) has a chunk a parameter. In EXIF, ImageDescription holds all of them as one JSON object. Both also hold
what AUTOMATIC1111's web UI would write of the picture (a1111.py): PNG as `parameters`, EXIF as UserComment.
"""

import io
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, BinaryIO

from sd.pictures import a1111

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
OPTIONS = {"JPEG": {"quality": 95, "subsampling": "4:4:4"}, "WEBP": {"quality": 95, "method": 4}}
READ = ("PNG", *OPTIONS)
DESCRIPTION, COMMENT, EXIF = 0x010E, 0x9286, 0x8769
"""ImageDescription and UserComment, which is in the directory that the third one points to (Exif 2.3, 4.6)."""

UNICODE = b"UNICODE\0"
"""Before a UserComment in UTF-16 (Exif 2.3, 4.6.5)."""


def encoded(image: "Image.Image", ending: str, parameters: Mapping[str, object]) -> bytes:
    """The picture as a file of this ending, one of ENDINGS in any case. Raises ValueError where EXIF is too small."""
    from PIL import Image

    from sd.pictures.png import to_png

    kind = ENDINGS[ending.lower()]
    if kind == "PNG":
        return to_png(image, parameters)
    exif = Image.Exif()
    exif[DESCRIPTION] = json.dumps(parameters)
    exif.get_ifd(EXIF)[COMMENT] = UNICODE + a1111.written(parameters).encode("utf-16-be", "replace")
    data = io.BytesIO()
    try:
        image.save(data, format=kind, exif=exif, **OPTIONS[kind])
    except ValueError as error:
        raise ValueError(f"the prompt does not fit into a {kind} file: write a PNG ({error})") from None
    return data.getvalue()


def read_parameters(path: str | os.PathLike | BinaryIO) -> dict[str, object]:
    """What `encoded` wrote. Raises OSError if it is no such picture, ValueError without any parameters.

    Only the head of the file is read: the pixels are not decoded.
    """
    from sd.images import opened
    from sd.pictures import png

    with opened(path, READ) as image:
        kind = image.format
    return png.read_parameters(path) if kind == "PNG" else _described(path)


def read_foreign(path: str | os.PathLike | BinaryIO) -> tuple[dict[str, object], dict[str, str]]:
    """What AUTOMATIC1111's web UI wrote: our parameters, and by its names what is none. Raises ValueError without."""
    from sd.images import opened

    with opened(path, READ) as image:
        text = image.info.get("parameters") if image.format == "PNG" else _comment(image)
    if not isinstance(text, str) or "Steps:" not in text:
        raise ValueError(f"{path} holds no parameters of a picture drawn by this program, or by AUTOMATIC1111's")
    return a1111.read(text)


def _described(path: str | os.PathLike | BinaryIO) -> dict[str, object]:
    from PIL import Image

    from sd.images import opened

    try:
        with opened(path, READ) as image:
            found = json.loads(str(image.getexif().get(DESCRIPTION, "")))
    except (SyntaxError, ValueError, RecursionError, Image.DecompressionBombError):
        found = None
    if not isinstance(found, dict) or "prompt" not in found:
        raise ValueError(f"{path} holds no parameters of a picture drawn by this program")
    return found


def _comment(image: "Image.Image") -> str:
    """The UserComment. Programs disagree about its byte order, which a prompt's many zeros tell."""
    data = image.getexif().get_ifd(EXIF).get(COMMENT, b"")
    if isinstance(data, str):
        return data
    if not data.startswith(UNICODE):
        return data.removeprefix(b"ASCII\0\0\0").decode("utf-8", "replace")
    text = data[len(UNICODE) :]
    little = text[1::2].count(0) > text[::2].count(0)
    return text.decode("utf-16-le" if little else "utf-16-be", "replace")

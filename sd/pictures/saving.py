"""Where a finished picture goes: to its file, to a new file, or to standard output."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sd.pictures.formats import encoded
from sd.pictures.parameters import UserError
from sd.writing import write_new, write_whole

if TYPE_CHECKING:
    from PIL import Image

Save = Callable[["Image.Image", Path, Mapping[str, object]], str]
"""save(image, file, parameters) -> the name to tell. Raises UserError, naming the file that cannot be written."""

STDOUT = "-"


def to_file(image: "Image.Image", file: Path, parameters: Mapping[str, object]) -> str:
    """To that file, in the place of one that is there; its folder is made."""
    return _written(file, lambda: write_whole(file, _made(image, file, parameters)) or file)


def to_new_file(image: "Image.Image", file: Path, parameters: Mapping[str, object]) -> str:
    """To that file, or where somebody has written one since, to the next free name."""
    return _written(file, lambda: write_new(file, _made(image, file, parameters)))


def to_stdout(image: "Image.Image", file: Path, parameters: Mapping[str, object]) -> str:
    """A PNG to standard output."""
    sys.stdout.buffer.write(encoded(image, ".png", parameters))
    sys.stdout.buffer.flush()
    return "standard output"


def _made(image: "Image.Image", file: Path, parameters: Mapping[str, object]) -> bytes:
    file.parent.mkdir(parents=True, exist_ok=True)
    return encoded(image, file.suffix, parameters)


def _written(file: Path, write: Callable[[], Path]) -> str:
    try:
        return os.fspath(write())
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror or error})") from None

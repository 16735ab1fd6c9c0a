"""What a PNG of this program says of itself, read without Pillow, where only Modal's client is installed."""

import json
import zlib
from contextlib import suppress
from pathlib import Path


def png_parameters(path: Path) -> dict[str, object]:
    """As `png.read_parameters` reads them. Raises OSError, or ValueError for any other file."""
    found = {}
    with path.open("rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            raise ValueError(f"{path} is no PNG")
        while head := file.read(8):
            size, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"IDAT":
                break
            data = file.read(size + 4)[:size]
            if kind == b"iTXt":
                found |= _text_chunk(data)
    if "prompt" not in found:
        raise ValueError(f"{path} holds no parameters of a picture drawn by this program")
    return found


def _text_chunk(data: bytes) -> dict[str, object]:
    """An iTXt chunk: keyword, 0, compressed?, method, language, 0, translated keyword, 0, text (PNG 11.3.4.5)."""
    keyword, _, rest = data.partition(b"\0")
    text = rest[2:].split(b"\0", 2)[2]
    with suppress(ValueError, zlib.error):
        return {keyword.decode("latin-1"): json.loads(zlib.decompress(text) if rest[0] else text)}
    return {}

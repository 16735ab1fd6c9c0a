"""Pictures that a request brings along: looked at when it comes, decoded when its turn comes.

A file of 100 KB can unpack to hundreds of megabytes. What its head says is checked at once; the pixels are decoded by
the thread that draws, so that there are those of one request.
"""

import base64
import io
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sd.service.worker import FailedError

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 4096 * 4096
"""Of a picture of up to 4 bytes a pixel, once it is decoded."""

MOST_WIDE_PIXELS = 2048 * 2048
"""Of one whose gray has more than 8 bits, which takes 8 bytes a pixel while it is made narrower."""

MOST_OBLONG = 4
"""The longer side over the shorter one: it decides the shape of what is drawn from it."""

TURNED = (5, 6, 7, 8)
"""Of EXIF's orientations, those that swap width and height."""


@dataclass(frozen=True)
class Upload:
    """A picture file of a request. size: width and height, upright."""

    name: str
    data: bytes
    size: tuple[int, int]

    def decode(self) -> "Image.Image":
        """The picture, upright. Raises FailedError for what is damaged."""
        from sd.images import upright

        try:
            return upright(_opened(self.data))
        except MemoryError:
            raise
        except Exception:  # decoders raise whatever they stumble over
            raise FailedError(422, f"{self.name} is a damaged picture") from None

    def said(self) -> dict[str, object]:
        """What PNGs say of it."""
        from sd.pictures.provenance import fingerprint

        with tempfile.NamedTemporaryFile() as file:
            file.write(self.data)
            file.flush()
            return {self.name: "upload", f"{self.name}_hash": fingerprint(file.name)}


def read_upload(name: str, upload: object) -> Upload:
    """A picture file in base64, or a data: URL, whose pixels are not looked at. Raises ValueError."""
    data = decoded(name, upload)
    return Upload(name, data, _checked_size(name, data))


def decoded(name: str, upload: object) -> bytes:
    """The bytes of a file in base64, or of a data: URL. Raises ValueError."""
    if not isinstance(upload, str):
        raise ValueError(f"{name} must be a picture file in base64")
    try:
        return base64.b64decode(upload.rpartition("base64,")[2], validate=True)
    except ValueError:
        raise ValueError(f"{name} is not base64") from None


def _opened(data: bytes) -> "Image.Image":
    """The picture, not decoded. No icons: Pillow decodes those at once, at a size that their head need not say."""
    from PIL import Image

    from sd.images import FORMATS

    return Image.open(io.BytesIO(data), formats=[one for one in FORMATS if one != "ICO"])


def _checked_size(name: str, data: bytes) -> tuple[int, int]:
    from PIL import Image

    try:
        with _opened(data) as image:
            exif = Image.Image.getexif(image)  # that of PNGs would decode the pixels
            (width, height), mode, turned = image.size, image.mode, exif.get(0x0112) in TURNED
            turned = turned and image.format != "TIFF"  # whose size is the upright one
    except Exception:
        raise ValueError(f"{name} cannot be read as a picture") from None
    most = MOST_WIDE_PIXELS if mode.startswith(("I", "F")) else MOST_PIXELS
    if width * height > most:
        side = int(most**0.5)
        raise ValueError(f"{name} is {width}x{height} of the kind {mode}: at most {side}x{side} pixels are read here")
    if max(width, height) > MOST_OBLONG * min(width, height):
        raise ValueError(f"{name} is {width}x{height}: too oblong, over {MOST_OBLONG} to 1")
    return (height, width) if turned else (width, height)

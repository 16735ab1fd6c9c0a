"""Hints for ControlNets out of pictures: what a `canny` one was trained to see, for example.

Needs no torch; Pillow and OpenCV are imported by what needs them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sd.nearest import there_are

if TYPE_CHECKING:
    from PIL import Image

PREPROCESSORS = ("none", "canny", "invert")
"""none: the picture is a hint already. canny: white edges on black (OpenCV). invert: of a drawing in black on white,
for ControlNets of scribbles and line art, which see white on black."""

CANNY = 100, 200
"""The thresholds that the first ControlNet was shown with: weak edges count beside strong ones only."""

GET_OPENCV = "canny needs OpenCV: pip install opencv-python-headless"


def one_each(names: Sequence[str] | str | None, controls: int) -> list[str]:
    """A preprocessor for each of so many controls: none, one for all, or one each. Raises ValueError."""
    names = [names] if isinstance(names, str) else list(names or ["none"])
    if unknown := [name for name in names if name not in PREPROCESSORS]:
        raise ValueError(f"no control_preprocess {unknown[0]!r}{there_are(unknown[0], PREPROCESSORS)}")
    if len(names) not in (1, controls):
        raise ValueError(f"{len(names)} control_preprocess for {controls} controls: give one for all, or one each")
    return names * controls if len(names) == 1 else names


def preprocessed(picture: "Image.Image", name: str) -> "Image.Image":
    """A hint out of an RGB picture. Raises ValueError where OpenCV is not installed."""
    import numpy as np
    from PIL import Image, ImageOps

    if name == "canny":
        return Image.fromarray(_opencv().Canny(np.asarray(picture), *CANNY)).convert("RGB")
    return ImageOps.invert(picture) if name == "invert" else picture


def check_installed(names: Sequence[str]) -> None:
    """Raise ValueError, which says how to install it, where one of these needs OpenCV and it is not here."""
    if "canny" in names:
        _opencv()


def _opencv():
    try:
        import cv2
    except ImportError:
        raise ValueError(GET_OPENCV) from None
    return cv2

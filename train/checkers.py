"""What is in a picture, told from its pixels alone: the judges of evaluation.

They share no code with train/colours.py: names come from ranges of hue, saturation and value, not from OKLab. All take
pictures as uint8 RGB [H, W, 3]. Needs scipy, for connected components.
"""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray

# Upper ends of hue ranges in degrees (HSV). Red is on both sides of 0.
_HUE_ENDS = (17, 43, 68, 168, 255, 292, 343, 360)
_HUE_NAMES = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "red")
NAMES = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
_HUE_INDICES = np.array([NAMES.index(name) for name in _HUE_NAMES])

Shape = tuple[str, str, tuple[float, float]]  # shape, colour, centre (x, y) in pixels


def hsv(rgb: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """uint8 [..., 3] -> hue in degrees 0..360, saturation 0..1, value 0..1, each fp32 [...]."""
    r, g, b = np.moveaxis(rgb.astype(np.float32) / 255, -1, 0)
    value = np.maximum(np.maximum(r, g), b)
    spread = value - np.minimum(np.minimum(r, g), b)
    safe = np.maximum(spread, 1e-6)
    sector = np.where(value == r, (g - b) / safe % 6, np.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    return 60 * sector, spread / np.maximum(value, 1e-6), value


def name_colours(rgb: ndarray) -> ndarray:
    """Indices into NAMES for pixels, uint8 [P, 3] -> int [P]."""
    hue, saturation, value = hsv(rgb)
    index = np.array([NAMES.index(name) for name in _HUE_NAMES])[
        np.searchsorted(_HUE_ENDS, hue, side="right").clip(0, 7)
    ]
    pale_red = ((hue < 14) | (hue > 330)) & (saturation < 0.52) & (value > 0.75)
    index[pale_red] = NAMES.index("pink")
    index[(hue >= 8) & (hue < 48) & (value < 0.68)] = NAMES.index("brown")
    neutral = (saturation < 0.16) | (value < 0.14) | ((saturation < 0.28) & (value < 0.32))
    grays = np.where(
        value < 0.36, NAMES.index("black"), np.where(value > 0.84, NAMES.index("white"), NAMES.index("gray"))
    )
    return np.where(neutral, grays, index)


def _border(picture: ndarray, width: int = 3) -> ndarray:
    """Pixels of the frame, uint8 [P, 3]."""
    inner = np.zeros(picture.shape[:2], bool)
    inner[width:-width, width:-width] = True
    return picture[~inner]


def _border_median(picture: ndarray) -> ndarray:
    return np.median(_border(picture), axis=0)


def background_colour(picture: ndarray) -> str:
    """Name of the colour of the border's median."""
    return NAMES[int(name_colours(_border_median(picture).round().astype(np.uint8)[None])[0])]


def foreground(picture: ndarray, threshold: int = 34) -> ndarray:
    """Pixels that differ from the border's median by more than `threshold` of 255 in a channel: bool [H, W]."""
    return np.abs(picture - _border_median(picture)).max(-1) > threshold


def vote(rgb: ndarray) -> str:
    """The colour that a person would name for the pixels of one thing, uint8 [P, 3].

    Eyes, noses and highlights are black or white in pictures of any colour, so hues outvote neutrals that are not much
    more common.
    """
    if not len(rgb):
        return "white"
    counts = np.bincount(name_colours(rgb), minlength=len(NAMES))
    hues, neutrals = counts[:8], counts[8:]
    if hues.sum() > 0.30 * len(rgb):
        return NAMES[int(hues.argmax())]
    return NAMES[8 + int(neutrals.argmax())]


def dominant_colour(picture: ndarray) -> str:
    """Name of the colour of what stands before the background."""
    mask = foreground(picture)
    if mask.mean() < 0.01:  # white on white: only the shading tells them apart
        mask = foreground(picture, threshold=10)
    return vote(picture[mask])


def find_shapes(picture: ndarray, smallest: int = 60) -> list[Shape]:
    """The flat shapes before the background, from left to right; components under `smallest` pixels are noise."""
    from scipy import ndimage

    labels, _ = ndimage.label(foreground(picture, threshold=48))
    found = []
    for number, window in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[window] == number
        if mask.sum() >= smallest:
            ys, xs = np.nonzero(mask)
            centre = (window[1].start + xs.mean(), window[0].start + ys.mean())
            core = ndimage.binary_erosion(mask)  # without the blend with the background
            colour = vote(picture[window][core if core.any() else mask])
            found.append((name_shape(ndimage.binary_fill_holes(mask)), colour, centre))
    return sorted(found, key=lambda shape: shape[2][0])


def name_shape(mask: ndarray) -> str:
    """Which of the shapes fills its bounding box, bool [h, w], like this. Triangles have their tip up."""
    h, w = mask.shape
    extent = mask.mean()
    if extent < 0.66:
        return "triangle"
    elongated = max(h, w) / min(h, w) > 1.35
    if extent > 0.89:
        return "rectangle" if elongated else "square"
    return "oval" if elongated else "circle"


def relation(a: Sequence[float], b: Sequence[float]) -> str:
    """Where the centre a lies as seen from b, both (x, y)."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"

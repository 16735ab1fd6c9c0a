"""Named colours, and giving a picture one of them as a person would: in OKLab, whose lightness is close to the eye's.

Axes: H W pixels, P pixels of any shape. Pictures are uint8 RGBA with straight alpha. L, C and hue (degrees) are OKLab's
lightness 0..1, chroma and angle (https://bottosson.github.io/posts/oklab).
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

HUES = ("red", "orange", "yellow", "green", "blue", "purple", "pink")  # one of these is held out for each concept
NEUTRALS = (
    "brown",
    "black",
    "white",
    "gray",
)  # brown is dark orange, but what follows for the other three holds for it
COLOURS = HUES + NEUTRALS

# What backgrounds and shapes are filled with, sRGB.
FILL = {
    "red": (222, 40, 44),
    "orange": (247, 140, 30),
    "yellow": (252, 217, 48),
    "green": (52, 168, 72),
    "blue": (44, 106, 226),
    "purple": (138, 70, 200),
    "pink": (248, 152, 198),
    "brown": (128, 80, 46),
    "black": (22, 22, 26),
    "white": (255, 255, 255),
    "gray": (150, 150, 153),
}


@dataclass(frozen=True)
class Paint:
    """What the middle tone of a surface becomes; `turn` is how far the hue moves, in degrees, per unit of shade."""

    lightness: float
    chroma: float
    hue: float
    turn: float = 0.0


# Yellow in shade turns to orange, or it would look olive; pink in shade turns to red-violet, not to gray.
PAINTS = {
    "red": Paint(0.60, 0.225, 26.0),
    "orange": Paint(0.745, 0.175, 57.0, -20.0),
    "yellow": Paint(0.885, 0.175, 98.0, -75.0),
    "green": Paint(0.68, 0.190, 144.0),
    "blue": Paint(0.58, 0.185, 258.0),
    "purple": Paint(0.54, 0.215, 303.0),
    "pink": Paint(0.775, 0.150, 351.0, 15.0),
    "brown": Paint(0.46, 0.080, 55.0),
    "black": Paint(0.26, 0.006, 280.0),
    "white": Paint(0.945, 0.004, 280.0),
    "gray": Paint(0.66, 0.006, 280.0),
}

SATURATED = 0.055  # chroma above which a pixel has a hue worth naming
HUE_WINDOW = 48.0  # degrees either side of the dominant hue that count as the same surface
ONE_HUE = 0.60  # share of the saturated pixels, by chroma, that one hue must cover
ENOUGH = 0.25  # share of the picture that must take the colour

_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    dtype=np.float32,
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    dtype=np.float32,
)
_FROM_LMS = np.linalg.inv(_TO_LMS)
_FROM_LAB = np.linalg.inv(_TO_LAB)
_LINEAR = np.arange(256, dtype=np.float32) / 255
_LINEAR = np.where(_LINEAR <= 0.04045, _LINEAR / 12.92, ((_LINEAR + 0.055) / 1.055) ** 2.4).astype(np.float32)


def to_oklch(rgb: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """sRGB uint8 [P, 3] -> lightness 0..1, chroma, hue in degrees 0..360, each fp32 [P]."""
    lab = np.cbrt(_LINEAR[rgb] @ _TO_LMS.T) @ _TO_LAB.T
    lightness, a, b = np.moveaxis(lab, -1, 0)
    return lightness, np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360


def _to_linear(lightness: ndarray, chroma: ndarray, hue: ndarray) -> ndarray:
    angle = np.radians(hue)
    lab = np.stack([lightness, chroma * np.cos(angle), chroma * np.sin(angle)], axis=-1)
    return (lab @ _FROM_LAB.T) ** 3 @ _FROM_LMS.T


def from_oklch(lightness: ndarray, chroma: ndarray, hue: ndarray) -> ndarray:
    """The nearest sRGB colours, uint8 [P, 3]: what the display cannot show loses chroma, not lightness or hue."""
    chroma = chroma.copy()
    linear = _to_linear(lightness, chroma, hue)
    outside = np.flatnonzero(((linear < -1e-3) | (linear > 1.001)).any(-1))
    if len(outside):
        chroma[outside] = _largest_chroma(lightness[outside], chroma[outside], hue[outside])
        linear = _to_linear(lightness, chroma, hue)
    linear = linear.clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (srgb * 255).round().astype(np.uint8)


def _largest_chroma(lightness: ndarray, chroma: ndarray, hue: ndarray) -> ndarray:
    low, high = np.zeros_like(chroma), chroma
    for _ in range(6):
        middle = (low + high) / 2
        linear = _to_linear(lightness, middle, hue)
        inside = ((linear >= -1e-3) & (linear <= 1.001)).all(-1)
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return low


@dataclass(frozen=True)
class Surface:
    """The part of a picture that takes a new colour: pixels near `hue`, or, where it is None, those without a hue."""

    hue: float | None
    lightness: float  # median of the part
    chroma: float


def _angle(a: ndarray, b: float) -> ndarray:
    """Signed difference of hues in degrees, -180..180."""
    return (a - b + 180) % 360 - 180


def _ramp(x: ndarray, low: float, high: float) -> ndarray:
    """0 below `low`, 1 above `high`, smooth between."""
    t = ((x - low) / (high - low)).clip(0, 1)
    return t * t * (3 - 2 * t)


def _dominant_hue(hue: ndarray, weight: ndarray) -> tuple[float, float]:
    """The hue that most of the weight is near to, and the share of the weight within its window."""
    histogram = np.bincount((hue // 4).astype(int) % 90, weight, minlength=90)
    reach = int(HUE_WINDOW // 4)
    held = sum((reach - abs(k)) * np.roll(histogram, k) for k in range(-reach, reach + 1))
    best = float(np.argmax(held)) * 4 + 2
    near = np.abs(_angle(hue, best)) < HUE_WINDOW
    centre = best + np.average(_angle(hue, best)[near], weights=weight[near])
    return float(centre % 360), float(weight[near].sum() / weight.sum())


def find_surface(rgba: ndarray, one_hue: float = ONE_HUE) -> Surface | None:
    """What could be recoloured in a picture, uint8 [H, W, 4]; None where no one hue, or absence of hue, dominates."""
    lightness, chroma, hue = to_oklch(rgba[rgba[..., 3] > 128][:, :3])
    saturated = chroma > SATURATED
    centre, share, enough = None, 1.0, 0.55
    if saturated.mean() > 0.30:
        enough = ENOUGH
        centre, share = _dominant_hue(hue[saturated], chroma[saturated])
    surface = _describe(centre, lightness, chroma, hue)
    covers = _weight(surface, lightness, chroma, hue).mean()
    return surface if share > one_hue and covers > enough else None


def _describe(centre: float | None, lightness: ndarray, chroma: ndarray, hue: ndarray) -> Surface:
    part = _weight(Surface(centre, 0.5, 0.0), lightness, chroma, hue) > 0.5
    if not part.any():
        part[:] = True
    return Surface(centre, float(np.median(lightness[part])), float(np.median(chroma[part])))


def _weight(surface: Surface, lightness: ndarray, chroma: ndarray, hue: ndarray) -> ndarray:
    """How much of each pixel belongs to the surface, 0..1."""
    if surface.hue is None:
        grayish = 1 - _ramp(chroma, 0.055, 0.085)
        return grayish * _ramp(lightness, 0.30, 0.45) if surface.lightness > 0.5 else grayish
    lit = _ramp(lightness, 0.42 * surface.lightness, 0.68 * surface.lightness)  # outlines and eyes stay dark
    near = 1 - _ramp(np.abs(_angle(hue, surface.hue)), HUE_WINDOW, HUE_WINDOW + 15)
    return _ramp(chroma, 0.02, 0.05) * near * lit


def recolour(rgba: ndarray, surface: Surface, colour: str) -> ndarray:
    """The picture with its surface in `colour`, shading kept: uint8 [H, W, 4], alpha untouched."""
    solid = rgba[..., 3] > 0
    rgb = rgba[solid][:, :3]
    lightness, chroma, hue = to_oklch(rgb)
    weight = _weight(surface, lightness, chroma, hue)[:, None]
    painted = from_oklch(*_paint(PAINTS[colour], surface, lightness, chroma, hue))
    result = rgba.copy()
    result[solid, :3] = (weight * painted + (1 - weight) * rgb).round().astype(np.uint8)
    return result


def _relight(lightness: ndarray, middle: float, target: float) -> ndarray:
    """Lightness such that `middle` becomes `target`, in order, black and white kept."""
    if target > middle:
        return lightness.clip(1e-3, 1) ** (np.log(target) / np.log(middle))
    slope = min(1.5, (1 - target) / (1 - middle))  # steeper, the highlights of a pale thing would tear it apart
    return np.where(lightness < middle, lightness * (target / middle), target + slope * (lightness - middle))


def _paint(
    paint: Paint, surface: Surface, lightness: ndarray, chroma: ndarray, hue: ndarray
) -> tuple[ndarray, ndarray, ndarray]:
    new = _relight(lightness, min(max(surface.lightness, 0.12), 0.97), paint.lightness)
    if surface.hue is None:
        strength, drift = np.float32(1.0), np.float32(0.0)
    else:
        strength = (chroma / max(surface.chroma, 1e-3)).clip(0, 1.3)
        drift = 0.25 * _angle(hue, surface.hue)  # gradients between neighbouring hues stay visible, but weaker
    shade = (paint.lightness - new).clip(0, None)
    return new, paint.chroma * strength * np.ones_like(new), paint.hue + paint.turn * shade + drift

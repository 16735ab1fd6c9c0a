"""Drawing over a picture: the whole of it, a part that a mask shows, what lies around it, or all of it larger.

White in a mask is drawn anew, black stays: at the end the picture's own pixels are put back there, so that they are not
even decoded anew. All here is Pillow's; how latents are kept is in sd/start.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

from sd.images import from_pil, resized, to_rgb

Box = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels; the latter two are not within."""


# ---- masks


def mask_of(mask: Image.Image, height: int, width: int) -> Image.Image:
    """A mask of any size and mode in black and white: white from the middle gray on, black where it is transparent."""
    gray = to_rgb(mask).convert("L") if not mask.has_transparency_data else _over_black(mask)
    return resized(gray, height, width).point(lambda value: 255 if value >= 128 else 0)


def _over_black(mask: Image.Image) -> Image.Image:
    mask = mask.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask).convert("L")


def region_around(mask: Image.Image, padding: int, height: int, width: int) -> Box:
    """The box around what is white and padding pixels, then in the proportions of height x width, if there is room.

    Raises ValueError for a mask without white.
    """
    found = mask.getbbox()
    if found is None:
        raise ValueError("the mask is black all over: nothing is drawn anew")
    (left, right), (top, bottom) = (
        (max(0, low - padding), min(side, high + padding))
        for low, high, side in ((found[0], found[2], mask.width), (found[1], found[3], mask.height))
    )
    if (right - left) * height > (bottom - top) * width:
        top, bottom = _widened(top, bottom, (right - left) * height // width, mask.height)
    else:
        left, right = _widened(left, right, (bottom - top) * width // height, mask.width)
    return left, top, right, bottom


def _widened(low: int, high: int, length: int, most: int) -> tuple[int, int]:
    """A span of this length with the old one in its middle, moved or cut where it would leave [0, most]."""
    low -= (length - (high - low)) // 2
    low = max(0, min(low, most - length))
    return low, min(most, low + length)


# ---- what is drawn, and how it comes back


@dataclass(frozen=True)
class Edit:
    """A picture that is drawn over, on the way there and back.

    image: RGB. mask: of any size and mode, with a region as large as the image and black and white; None to draw all of
    it. region: the box that is drawn, None for all. blur: over so many pixels drawn becomes kept. shown: width and
    height of the result, if not all is.
    """

    image: Image.Image
    mask: Image.Image | None = None
    region: Box | None = None
    blur: float = 0.0
    shown: tuple[int, int] | None = None

    def pixels(self, height: int, width: int) -> Tensor:
        """What is drawn over, [1, 3, height, width] in [-1, 1]."""
        return from_pil(self.image.crop(self.region) if self.region else self.image, height, width)

    def pixel_mask(self, height: int, width: int) -> Tensor | None:
        """[1, 1, height, width], 1 where it is drawn anew."""
        if self.mask is None:
            return None
        part = self.mask.crop(self.region) if self.region else self.mask
        return torch.from_numpy(np.asarray(mask_of(part, height, width)) >= 128)[None, None].float()

    def finished(self, drawn: Image.Image) -> Image.Image:
        """The drawn picture with what stays put back; of a region, the whole picture with that in it."""
        if self.mask is None:
            return drawn
        whole, image, mask = drawn, self.image, self.mask
        if self.region:
            left, top, right, bottom = self.region
            whole = image.copy()
            whole.paste(resized(drawn, bottom - top, right - left), (left, top))
        else:
            image = resized(image, drawn.height, drawn.width)
            mask = mask_of(mask, drawn.height, drawn.width)
        edge = mask.filter(ImageFilter.GaussianBlur(self.blur)) if self.blur else mask
        done = Image.composite(whole, image, edge)
        return done.crop((0, 0, *self.shown)) if self.shown else done


def edit(
    image: Image.Image,
    height: int,
    width: int,
    mask: Image.Image | None = None,
    invert: bool = False,
    blur: float = 0.0,
    padding: int | None = None,
) -> Edit:
    """A picture to draw at height x width. padding: only what the mask shows is, with so many pixels around it."""
    image = to_rgb(image)
    if mask is None:
        return Edit(image)
    mask = mask_of(mask, image.height, image.width) if padding is not None or invert else mask
    mask = ImageChops.invert(mask) if invert else mask
    region = None if padding is None else region_around(mask, padding, height, width)
    return Edit(image, mask, region, blur)


def edit_pairs(
    images: Sequence[Image.Image], masks: Sequence[Image.Image]
) -> list[tuple[Image.Image, Image.Image | None]]:
    """Each picture with its mask; one of either serves all of the other."""
    count = max(len(images), len(masks))
    each = [list(column) * count if len(column) == 1 else column or [None] * count for column in (images, masks)]
    return list(zip(*each, strict=True))


# ---- more around a picture


def sides(text: str | Sequence[int]) -> tuple[int, int, int, int]:
    """Pixels to the left, top, right and bottom, as numbers or as `64,0,64,0`. Raises ValueError."""
    try:
        numbers = tuple(int(n) for n in (text.split(",") if isinstance(text, str) else text))
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 4 or min(numbers) < 0 or not any(numbers):
        raise ValueError(f"outpaint must be pixels to the left, top, right and bottom, as 64,0,64,0, not {text!r}")
    return numbers


def outpainted_size(image: Image.Image, more: tuple[int, int, int, int], multiple: int) -> tuple[int, int]:
    """Height and width to draw a picture at that grows by so much: rounded up to what the model can draw."""
    width, height = to_rgb(image).size
    return rounded_up(canvas_size(height, width, more), multiple)


def canvas_size(height: int, width: int, more: tuple[int, int, int, int]) -> tuple[int, int]:
    """Height and width of a picture, upright, with what it grows by."""
    left, top, right, bottom = more
    return height + top + bottom, width + left + right


def outpainting(
    image: Image.Image,
    more: tuple[int, int, int, int],
    room: tuple[int, int] | None,
    mask: Image.Image | None = None,
    invert: bool = False,
    blur: float = 0.0,
) -> Edit:
    """A picture that grows to the sides; what is new continues its edge pixels, until it is drawn.

    room: height and width of the canvas, of which the right and lower rest is cut off again; None is what is shown.
    mask: of the picture, white where it is drawn anew too. blur: reaches into the picture, not into what is new.
    """
    left, top, right, bottom = more
    image = to_rgb(image)
    shown = image.width + left + right, image.height + top + bottom
    height, width = room or (shown[1], shown[0])
    right, bottom = width - image.width - left, height - image.height - top
    canvas = np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
    whole = Image.new("L", (width, height), 255)
    old = Image.new("L", image.size) if mask is None else mask_of(mask, image.height, image.width)
    old = ImageChops.invert(old) if mask is not None and invert else old
    whole.paste(old, (left, top))
    for box in _borders((left, top, left + image.width, top + image.height), more, math.ceil(2 * blur)):
        whole.paste(255, box)
    return Edit(Image.fromarray(canvas), whole, None, blur, shown if (width, height) != shown else None)


def _borders(inner: Box, more: tuple[int, int, int, int], inset: int) -> list[Box]:
    """Strips of the inner picture along the sides that grow, `inset` wide."""
    left, top, right, bottom = inner
    strips = [
        (left, top, left + inset, bottom),
        (left, top, right, top + inset),
        (right - inset, top, right, bottom),
        (left, bottom - inset, right, bottom),
    ]
    return [strip for strip, grows in zip(strips, more, strict=True) if grows and inset]


# ---- sizes


def upright(image: Image.Image) -> tuple[int, int]:
    """Height and width as the picture is looked at: a camera may have stored it lying on its side."""
    width, height = image.size
    return (width, height) if image.getexif().get(0x0112, 1) in (5, 6, 7, 8) else (height, width)


def same_shape(image: Image.Image, side: int, multiple: int) -> tuple[int, int]:
    """Height and width near image's aspect ratio, near side x side pixels in all, multiples of `multiple`."""
    return near_area(*upright(image), side, multiple)


def near_area(height: int, width: int, side: int, multiple: int) -> tuple[int, int]:
    """Height and width near that aspect ratio, near side x side pixels in all, multiples of `multiple`."""
    return larger_size(height, width, side / math.sqrt(width * height), multiple)


def rounded_up(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Each side to the next that the model can draw."""
    return tuple(-(-side // multiple) * multiple for side in size)


def other_side(height: int | None, width: int | None, shape: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Height and width, of which one is given: the other in the proportions of a shape, a multiple of `multiple`."""
    tall, wide = shape
    if height is None:
        return max(multiple, round(width * tall / wide / multiple) * multiple), width
    return height, max(multiple, round(height * wide / tall / multiple) * multiple)


def larger_size(height: int, width: int, scale: float, multiple: int) -> tuple[int, int]:
    """The sides times scale, to the nearest that the model can draw."""
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))

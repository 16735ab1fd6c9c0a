"""Repainting a part of a picture: white in the mask is drawn anew, black stays.

A model that was not trained for it repaints by blending (as in RePaint, Lugmayr et al. 2022, without its repetitions):
after each step the latents of what stays are those of the given picture, noised to the level that the step came to. At
the end its own pixels are put back where the mask is black, so that they are not even decoded anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from sd.ddpm import add_noise
from sd.images import to_rgb
from sd.schedules import Schedule


def mask_of(mask: Image.Image, height: int, width: int) -> Image.Image:
    """A mask of any size and mode in black and white: white from the middle gray on, black where it is transparent."""
    gray = to_rgb(mask).convert("L") if not mask.has_transparency_data else _over_black(mask)
    if gray.size != (width, height):
        gray = gray.resize((width, height), Image.Resampling.LANCZOS)
    return gray.point(lambda value: 255 if value >= 128 else 0)


def _over_black(mask: Image.Image) -> Image.Image:
    mask = mask.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask).convert("L")


def latent_mask(mask: Image.Image, downsampling: int) -> Tensor:
    """A black and white mask -> [1, 1, h, w], 1 where it is repainted: of each latent its upper left pixel."""
    pixels = torch.from_numpy(np.asarray(mask) >= 128)
    return pixels[::downsampling, ::downsampling][None, None].float()


@dataclass(frozen=True)
class Blend:
    """After each step, writes what stays to the latents x: clean, noised to the step's level. All are [B, z, h, w]."""

    schedule: Schedule
    clean: Tensor
    noise: Tensor
    mask: Tensor

    def __call__(self, step: int, x: Tensor) -> None:
        kept = add_noise(self.clean, self.noise, self.schedule.abars[step])
        x.copy_(torch.lerp(kept, x, self.mask))


def pasted(
    drawn: Sequence[Image.Image], original: Image.Image, mask: Image.Image, blur: float = 0.0
) -> list[Image.Image]:
    """The drawn pictures where the mask is white, else the original; over `blur` pixels one becomes the other."""
    width, height = drawn[0].size
    shape, original = mask_of(mask, height, width), to_rgb(original)
    if original.size != (width, height):
        original = original.resize((width, height), Image.Resampling.LANCZOS)
    edge = shape.filter(ImageFilter.GaussianBlur(blur)) if blur else shape
    return [Image.composite(image, original, edge) for image in drawn]

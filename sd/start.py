"""Where a picture starts: from noise, or from another one that is noised, of which a mask may keep a part.

A model that was not trained for masks repaints by blending (as in RePaint, Lugmayr et al. 2022, without its
repetitions): after each step the latents of what stays are those of the given picture, noised to the level that the
step came to. An inpainting model is told instead: beside the latents it takes the mask and the latents of what stays.

Axes: B batch, z latent channels, h w latent rows and columns, H W picture rows and columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sd.ddpm import add_noise
from sd.schedules import Schedule

Encode = Callable[[Tensor], Tensor]
"""Pictures [B, 3, H, W] in [-1, 1] -> latents [B, z, h, w], scaled; each call draws noise of the posterior."""


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


@dataclass(frozen=True)
class Start:
    """x [B, z, h, w] at the first level. blend: keeps what a mask leaves. beside: what an inpainting model is told."""

    x: Tensor
    blend: Blend | None = None
    beside: Tensor | None = None


def from_picture(
    pixels: Tensor, mask: Tensor | None, encode: Encode, noise: Callable[[], Tensor], levels: Schedule, strength: float
) -> Start:
    """Pictures [1 or B, 3, H, W] noised to the first level; mask [1 or B, 1, H, W] is 1 where they are drawn anew.

    First the posterior's noise is drawn, then the level's. Of a part that is drawn anew as a whole nothing is left.
    """
    clean = encode(pixels)
    fresh = noise()
    noised = add_noise(clean, fresh, levels.abars[0])
    if mask is None:
        return Start(noised)
    return Start(fresh if strength == 1 else noised, Blend(levels, clean, fresh, _of_latents(mask, clean)))


def for_inpainting(
    pixels: Tensor, mask: Tensor | None, encode: Encode, noise: Callable[[], Tensor], levels: Schedule, strength: float
) -> Start:
    """The same for an inpainting model, which sees the pictures where the mask is 0, and gray elsewhere.

    Without a mask all is drawn anew. Noise is drawn in diffusers' order: that of the posterior, where anything is left
    of the pictures, the level's, and the posterior's of what is seen.
    """
    if strength == 1:
        x = noise()
    else:
        clean = encode(pixels)
        x = add_noise(clean, noise(), levels.abars[0])
    mask = torch.ones_like(pixels[:, :1]) if mask is None else mask.to(pixels)
    seen = encode(pixels * (1 - mask))
    mask = _of_latents(mask, seen).expand(len(seen), -1, -1, -1)
    return Start(x, beside=torch.cat([mask, seen], dim=1))


def _of_latents(mask: Tensor, latents: Tensor) -> Tensor:
    """[.., 1, H, W] -> [.., 1, h, w]: of each latent the upper left pixel."""
    step = mask.shape[-1] // latents.shape[-1]
    return mask[..., ::step, ::step].to(latents)

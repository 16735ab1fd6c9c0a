"""A picture while it forms: latents to colours by a linear map, or by TAESD's small decoder.

What is shown is the clean picture that the network's latest prediction comes to (Ho et al. 2020, equation 15), not the
noisy latents: shapes are there after a few steps.

Axes: B batch, z latent channels, h w latent rows and columns.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sd.checkpoints.errors import CheckpointError, naming
from sd.checkpoints.files import open_checkpoint
from sd.images import to_pil

if TYPE_CHECKING:
    from sd.pipeline import StableDiffusion

Colours = Callable[[Tensor], Tensor]
"""Scaled latents [B, z, h, w] -> pictures [B, 3, H, W] in [-1, 1]; H is h, or some times that."""

FIT_SIDE = 256
"""Pixels a side of the drawing that the map is fitted to: 1,024 latents of SD 1.5."""


class Previews:
    """The pictures of a pipeline's batch as they are now: small ones, of a latent a pixel unless there is a decoder."""

    def __init__(self, pipe: "StableDiffusion", colours: Colours | None = None):
        self.pipe = pipe
        self.colours = colours or linear(pipe)

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> list[Image.Image]:
        """Of latents x [B, z, h, w], as `on_step` is given them, or rather of what was predicted from them."""
        latest = self.pipe.call.predicted
        return to_pil(self.colours((x if latest is None else latest()).float()))


# ---- a linear map


@torch.inference_mode()
def linear(pipe: "StableDiffusion") -> Colours:
    """The linear map from a latent to the mean colour of its pixels that fits this model's encoder best.

    It is fitted to the latents of one drawing of blurred noise in all colours, by least squares.
    """
    pixels = _drawing().to(pipe.device, pipe.dtype)
    latents = pipe.vae.encode(pixels)[0].float() * pipe.config.vae.scale_factor
    means = F.interpolate(pixels.float(), size=latents.shape[-2:], mode="area")
    rows, wanted = (t[0].flatten(1).T.cpu().double() for t in (latents, means))
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    matrix = torch.linalg.lstsq(rows, wanted).solution.float()
    weight, bias = matrix[:-1].T[:, :, None, None].to(pipe.device), matrix[-1].to(pipe.device)
    return lambda x: F.conv2d(x, weight, bias)


def _drawing() -> Tensor:
    """[1, 3, FIT_SIDE, FIT_SIDE] in [-1, 1]: noise at three sizes, from large areas to an eighth of a latent."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(1, 3, FIT_SIDE, FIT_SIDE)
    for side in (4, 16, FIT_SIDE // 8):
        noise = torch.randn(1, 3, side, side, generator=generator)
        total += F.interpolate(noise, size=(FIT_SIDE, FIT_SIDE), mode="bicubic", align_corners=False)
    return torch.tanh(0.7 * total)


# ---- TAESD


class Block(nn.Module):
    """Three convolutions beside a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        convolutions = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        first, second, third = convolutions
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyDecoder(nn.Sequential):
    """The decoder of TAESD (github.com/madebyollin/taesd): scaled latents to pictures, with its own module names."""

    def __init__(self, z_channels: int = 4, channels: int = 64):
        def level() -> list[nn.Module]:
            blocks = [Block(channels) for _ in range(3)]
            return [*blocks, nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]

        first = [nn.Identity(), nn.Conv2d(z_channels, channels, 3, padding=1), nn.ReLU()]
        super().__init__(*first, *level(), *level(), *level(), Block(channels), nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, z, h, w] -> [B, 3, 8h, 8w] in about [-1, 1]."""
        return super().forward(torch.tanh(x / 3) * 3) * 2 - 1


def tiny_decoder(path: str | os.PathLike, device: torch.device) -> TinyDecoder:
    """TAESD's decoder from its own file, or from diffusers' of the whole autoencoder. Raises CheckpointError."""
    with naming(path):
        tensors = _own_names(open_checkpoint(Path(path)).tensors)
        first = tensors.get("1.weight")
        if first is None or first.ndim != 4:
            raise CheckpointError("not a TAESD decoder: it lacks 1.weight")
        with torch.device("meta"):
            model = TinyDecoder(first.shape[1], first.shape[0])
        wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        found = {name: tuple(weight.shape) for name, weight in tensors.items()}
        if different := sorted(set(wanted.items()) ^ set(found.items())):
            raise CheckpointError(f"not a TAESD decoder: {different[0][0]} is missing, too much or misshapen")
        weights = {name: weight.to(device, torch.float32, copy=True) for name, weight in tensors.items()}
        model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def _own_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers counts the layers without the first, which has no weights, and keeps the encoder beside them."""
    prefix = "decoder.layers."
    decoder = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if not decoder:
        return tensors
    numbered = ((name.partition("."), t) for name, t in decoder.items())
    return {f"{int(number) + 1}.{rest}": t for (number, _, rest), t in numbered}


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """One picture of them all."""
    return images[0] if len(images) == 1 else Image.fromarray(np.concatenate([np.asarray(i) for i in images], axis=1))

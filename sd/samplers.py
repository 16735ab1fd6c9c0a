"""Samplers other than DDPM, and where the noise comes from. Nothing here knows a model."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sd.ddpm import Denoise, Noise, alphas_cumprod, ddpm, device_timesteps, predict_x0


def ddim(denoise: Denoise, x: Tensor, timesteps: Sequence[int], noise: Noise) -> Iterator[Tensor]:
    """The deterministic sampler (Song et al. 2020, equation 12 with eta 0): it never draws noise.

    x [B, C, H, W], timesteps falling. The last step goes to abar[0], not to 1: SD's `set_alpha_to_one` is false.
    """
    abar = alphas_cumprod()
    ts = device_timesteps(timesteps, x.device)
    for i, t in enumerate(timesteps):
        abar_prev = abar[timesteps[i + 1]] if i + 1 < len(timesteps) else abar[0]
        eps = denoise(x, ts[i])
        x = abar_prev**0.5 * predict_x0(x, eps, abar[t]) + (1 - abar_prev) ** 0.5 * eps
        yield x


SAMPLERS: dict[str, Callable[..., Iterator[Tensor]]] = {"ddpm": ddpm, "ddim": ddim}


class PictureNoise:
    """Gaussian noise for a batch, each picture's drawn from a CPU generator of its own.

    So one seed gives one picture: on every device, alone or in any batch. Calling it returns [B, *shape].
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device, dtype: torch.dtype):
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.shape = tuple(shape)
        self.device = device
        self.dtype = dtype

    def __call__(self) -> Tensor:
        noise = torch.cat([torch.randn(1, *self.shape, generator=g, dtype=torch.float32) for g in self.generators])
        return noise.to(self.device, self.dtype)

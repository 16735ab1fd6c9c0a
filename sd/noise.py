"""Where the noise comes from."""

from collections.abc import Sequence

import torch
from torch import Tensor


class PictureNoise:
    """Gaussian noise for a batch, each picture's drawn from a CPU generator of its own.

    So one seed gives one picture: on every device, alone or in any batch. Calling it returns [B, *shape]. Of a seed the
    generator takes the low 32 bits, here as in diffusers: 7 and 7 + 2**32 draw the same.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device, dtype: torch.dtype):
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.shape = tuple(shape)
        self.device = device
        self.dtype = dtype

    def __call__(self) -> Tensor:
        noise = torch.cat([torch.randn(1, *self.shape, generator=g, dtype=torch.float32) for g in self.generators])
        return noise.to(self.device, self.dtype)

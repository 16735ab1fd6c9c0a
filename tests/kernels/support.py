"""Random numbers, and how far from float64 what a kernel made of them is."""

import torch
from torch import Tensor

from sd.kernels import native

G = {  # the kernels' transforms by m, as in Lavin and Gray
    2: torch.tensor([[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]], dtype=torch.float64),
    4: torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64)
    / 24,
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    assert reference.dtype == torch.float64
    return ((out.double() - reference).norm() / reference.norm().clamp(min=1e-30)).item()


def native_conv(x: Tensor, weight: Tensor, m: int, *more: Tensor | None, upsampled: bool = False) -> Tensor:
    kernel = native.winograd_kernel(weight, G[m], upsampled)
    return native.winograd(x, kernel, weight.shape[0], *more, upsampled=upsampled, m=m)

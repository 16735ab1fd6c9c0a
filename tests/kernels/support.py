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


def error(out: Tensor, reference: Tensor, terms: Tensor | None = None) -> float:
    """Relative to the reference, or to the terms that were summed: a sum of few numbers may cancel to almost none."""
    assert out.shape == reference.shape
    assert reference.dtype == torch.float64
    size = max(reference.norm().item(), 0.0 if terms is None else terms.norm().item(), 1e-30)
    return (out.double() - reference).norm().item() / size


def terms(left: Tensor, right: Tensor) -> Tensor:
    """[rows, inner], [columns, inner] -> [rows, columns]: the size of left @ right.T where nothing cancels."""
    return left.double().norm(dim=-1, keepdim=True) * right.double().norm(dim=-1)


def native_conv(x: Tensor, weight: Tensor, m: int, *more: Tensor | None, upsampled: bool = False) -> Tensor:
    kernel = native.winograd_kernel(weight, G[m], upsampled)
    return native.winograd(x, kernel, weight.shape[0], *more, upsampled=upsampled, m=m)

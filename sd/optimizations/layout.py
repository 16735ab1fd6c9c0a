"""Channels innermost in memory, and the 1x1 convolutions that are matrix products then."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.optimizations.base import Patch, Stage, optimization


@optimization("channels-last", stage=Stage.LAYOUT, exact=True, summary="channels innermost in memory")
def channels_last(patch: Patch) -> None:
    """Convolution weights, and so all activations, with the channels innermost in memory. Exact.

    Helps: tensor cores read this layout and cuDNN otherwise converts to it and back; a transformer's reshape between
    grid and sequence becomes free. Hurts: on some CPUs at some sizes.
    """
    for model in (patch.unet, patch.vae):
        kernels = [name for name, weight in model.named_parameters() if weight.ndim == 4]
        patch.converts(model, kernels, back=lambda model=model: model.to(memory_format=torch.contiguous_format))
        model.to(memory_format=torch.channels_last)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution as a matrix product over positions."""

    kernel = "matrix product over positions"

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        return self._product(x, None)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        y = F.linear(rows.reshape(-1, self.in_channels), self.weight.flatten(1), bias)
        return y.unflatten(0, rows.shape[:3]).permute(0, 3, 1, 2)


@optimization(
    "pointwise-linear",
    stage=Stage.LAYERS,
    exact=True,
    summary="1x1 convolutions as matrix products",
    conflicts=("cpu-linear",),
)
def pointwise_linear(patch: Patch) -> None:
    """1x1 convolutions as matrix products, whose bias costs no extra pass. Exact; wants channels-last.

    Helps: a product of this shape has better kernels than a convolution. Hurts: without channels-last, where each
    activation is copied into that layout first. cpu-linear does it by kernels of its own.
    """
    for conv in patch.modules(nn.Conv2d, patch.unet, patch.vae):
        if conv.kernel_size == (1, 1):
            patch.swap(conv, PointwiseConv)

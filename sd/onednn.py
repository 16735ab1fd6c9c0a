"""Weights in the blocked layout of oneDNN, the library behind PyTorch's convolutions and matrix products on x86 CPUs.

PyTorch brings a convolution's weights into that layout at every call. At low resolutions that takes longer than the
convolution itself: 1280 to 1280 channels on 4x4 positions take 50 ms of which 10 are arithmetic (2 cores, AVX2).
"""

import torch
from torch import Tensor, nn

from sd.cache import stamp

MIN_WEIGHTS = 3_000_000  # below, the copy takes memory and saves little time


class Packed:
    """A layer's weight in oneDNN's layout, made again when the weight has changed."""

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        self.stamp: tuple = ()

    def of(self, weight: Tensor, pack) -> Tensor:
        current = stamp((weight,))
        if current != self.stamp:
            self.weight, self.stamp = pack(weight), current
        return self.weight


class PrepackedConv(nn.Conv2d):
    packed: Packed

    def forward(self, x: Tensor) -> Tensor:
        shape = self.padding, self.stride, self.dilation, self.groups
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.packed.of(self.weight, self._pack), self.bias, *shape, "none", [], ""
        )

    def _pack(self, weight: Tensor) -> Tensor:
        shape = self.padding, self.stride, self.dilation, self.groups
        return torch._C._nn.mkldnn_reorder_conv2d_weight(weight.detach().to_mkldnn(), *shape)


class PrepackedLinear(nn.Linear):
    packed: Packed

    def forward(self, x: Tensor) -> Tensor:
        weight = self.packed.of(self.weight, self._pack)
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")

    def _pack(self, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def prepack(model: nn.Module) -> None:
    """Swap the layers with many weights for prepacked ones; their parameters stay as they are."""
    kinds = {nn.Conv2d: PrepackedConv, nn.Linear: PrepackedLinear}
    for layer in model.modules():
        if type(layer) in kinds and layer.weight.numel() >= MIN_WEIGHTS:
            layer.__class__ = kinds[type(layer)]
            layer.packed = Packed()

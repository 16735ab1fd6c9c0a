"""Weights in the blocked layout of oneDNN, the library behind PyTorch's convolutions and matrix products on x86 CPUs.

PyTorch brings a convolution's weights into that layout at every call. At low resolutions that takes longer than the
convolution itself: 1280 to 1280 channels on 4x4 positions take 50 ms, of which 10 are arithmetic (2 cores, AVX2).
"""

import torch
from torch import Tensor, nn

from sd.cache import stamp

MIN_WEIGHTS = 7_000_000  # below, the copy takes memory and hardly saves time


def available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class PrepackedConv(nn.Conv2d):
    packed: Tensor
    packed_stamp: tuple

    def forward(self, x: Tensor) -> Tensor:
        layout = self.padding, self.stride, self.dilation, self.groups
        if stamp((self.weight,)) != self.packed_stamp:
            # Packed for the first shape it serves every other as well; packed for none it is up to 20 times slower.
            weight = self.weight.detach().to_mkldnn()
            self.packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *layout, list(x.shape))
            self.packed_stamp = stamp((self.weight,))
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed, self.bias, *layout, "none", [], "")


class PrepackedLinear(nn.Linear):
    packed: Tensor
    packed_stamp: tuple

    def forward(self, x: Tensor) -> Tensor:
        if stamp((self.weight,)) != self.packed_stamp:
            rows = x.numel() // x.shape[-1]
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach().contiguous(), rows)
            self.packed_stamp = stamp((self.weight,))
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


PREPACKED = {nn.Conv2d: PrepackedConv, nn.Linear: PrepackedLinear}


def prepack(model: nn.Module) -> None:
    """Swap the layers with many weights for prepacked ones, whose parameters stay as they are."""
    for layer in model.modules():
        if type(layer) in PREPACKED and layer.weight.numel() >= MIN_WEIGHTS:
            layer.__class__ = PREPACKED[type(layer)]
            layer.packed_stamp = ()

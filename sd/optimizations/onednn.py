"""Weights in the blocked layout of oneDNN, the library behind PyTorch's convolutions and matrix products on x86 CPUs.

PyTorch brings a convolution's weights into that layout at every call. At low resolutions that takes longer than the
convolution itself: 1280 to 1280 channels on 4x4 positions take 50 ms, of which 10 are arithmetic (2 cores, AVX2).
"""

import torch
from torch import Tensor, nn

from sd.checkpoints.stamps import Stamp
from sd.optimizations.base import Need, Patch, Stage, here, optimization
from sd.pipeline import StableDiffusion

MIN_WEIGHTS = 7_000_000  # below, the copy takes memory and hardly saves time


def _why_not(pipe: StableDiffusion) -> str:
    if pipe.device.type != "cpu" or pipe.dtype != torch.float32:
        return f"this is {here(pipe)}"
    return "" if supported() else "this PyTorch comes without oneDNN"


def supported() -> bool:
    """Whether this PyTorch brings oneDNN, and its functions that pack weights."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class PrepackedConv(nn.Conv2d):
    kernel = "oneDNN, packed once"
    packed: Tensor
    packed_stamp: Stamp | None

    def forward(self, x: Tensor) -> Tensor:
        layout = self.padding, self.stride, self.dilation, self.groups
        if Stamp((self.weight,)) != self.packed_stamp:
            # Packed for the first shape it serves every other as well; packed for none it is up to 20 times slower.
            weight = self.weight.detach().to_mkldnn()
            self.packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *layout, list(x.shape))
            self.packed_stamp = Stamp((self.weight,))
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed, self.bias, *layout, "none", [], "")


class PrepackedLinear(nn.Linear):
    kernel = "oneDNN, packed once"
    packed: Tensor
    packed_stamp: Stamp | None

    def forward(self, x: Tensor) -> Tensor:
        if Stamp((self.weight,)) != self.packed_stamp:
            rows = x.numel() // x.shape[-1]
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach().contiguous(), rows)
            self.packed_stamp = Stamp((self.weight,))
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


PREPACKED = {nn.Conv2d: PrepackedConv, nn.Linear: PrepackedLinear}


@optimization(
    "prepacked",
    stage=Stage.PREPACKING,
    exact=True,
    summary="large weights in oneDNN's layout",
    needs=Need("an x86 CPU, in fp32", _why_not),
    conflicts=("compile",),
)
def prepacked(patch: Patch) -> None:
    """Large weights in the layout that oneDNN computes with, once a model in place of once a call. Exact.

    Helps: CPUs, the more the smaller the picture. Hurts: memory, 2.1 GB for SD 1.5.
    """
    for plain, kind in PREPACKED.items():
        for layer in patch.modules(plain):
            if type(layer.weight) is nn.Parameter and layer.weight.numel() >= MIN_WEIGHTS:  # not quantized
                patch.swap(layer, kind, packed_stamp=None)

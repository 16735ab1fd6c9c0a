"""Modules of the UNet and the VAE whose arithmetic is in C++: fewer passes over memory, odd shapes fast.

    cpu-linear      linear layers, 1x1 and strided convolutions; GEGLU without its projection ever in memory
    cpu-attention   attention a chunk of keys at a time
    cpu-norm        GroupNorm with SiLU, LayerNorm; residual blocks whose convolutions add timestep and residual

Each class leaves its parameters as they are, and falls back to what it inherits for what the kernels do not take.
Axes: B batch, C channels, H W grid.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from sd.attention import attention
from sd.kernels import native
from sd.kernels.native import readable
from sd.optimizations.base import CPU_FP32, Need, Patch, Stage, added, optimization
from sd.optimizations.dot_layers import dot_attention
from sd.pipeline import StableDiffusion
from sd.unet import GEGLU, CrossAttention, ResBlock
from sd.vae import AttnBlock, ResnetBlock


def _why_not(pipe: StableDiffusion) -> str:
    return CPU_FP32.why_not(pipe) or native.why_not()


KERNELS = Need("a CPU, in fp32, and a C++ compiler", _why_not)

# ---- linear layers


class FastLinear(nn.Linear):
    kernel = "C++"

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return native.linear(x, weight, bias) if readable(x, weight) else F.linear(x, weight, bias)


class FastGEGLU(GEGLU):
    kernel = "C++"

    def forward(self, x: Tensor) -> Tensor:
        weight = self.proj.weight
        if not readable(x, weight) or weight.shape[0] % native.panel():
            return super().forward(x)
        return native.geglu(x, weight, self.proj.bias)


class FastPointwise(nn.Conv2d):
    """A 1x1 convolution as a product over positions."""

    kernel = "C++ product over positions"

    def forward(self, x: Tensor) -> Tensor:
        if not readable(x, self.weight):
            return super().forward(x)
        rows = x.permute(0, 2, 3, 1).contiguous()
        return native.linear(rows, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class FastPatches(nn.Conv2d):
    """A 3x3 convolution as a product of patches with the weights as they are."""

    kernel = "C++ patches"

    def forward(self, x: Tensor) -> Tensor:
        if not readable(x, self.weight):
            return super().forward(x)
        return native.conv3x3(x, self.weight, self.bias, self.stride[0])


def suits_patches(layer: nn.Module) -> bool:
    """Whether it is a 3x3 convolution that leaves positions out, or has few channels, so that patches are small."""
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == (3, 3)
        and (layer.padding, layer.dilation, layer.groups) == ((1, 1), (1, 1), 1)
        and (layer.stride == (2, 2) or (layer.stride == (1, 1) and layer.in_channels < 8))
    )


@optimization(
    "cpu-linear",
    stage=Stage.LAYERS,
    exact=True,
    summary="linear layers in C++, with GEGLU",
    needs=KERNELS,
    conflicts=("compile",),
)
def cpu_linear(patch: Patch) -> None:
    """Linear layers, 1x1 and strided convolutions by the C++ kernels, GEGLU's gate within its product. Exact.

    Helps: GEGLU, whose projection is the largest activation. Hurts: CPUs without AVX2, for which nothing is tuned.
    """
    for layer in patch.modules(nn.Linear, patch.unet, patch.vae):
        if readable(layer.weight):  # not quantized
            patch.swap(layer, FastLinear)
    for layer in patch.modules(GEGLU, patch.unet):
        if type(layer.proj) is FastLinear:
            patch.swap(layer, FastGEGLU)
    for layer in patch.modules(nn.Conv2d, patch.unet, patch.vae):
        if layer.kernel_size == (1, 1):
            patch.swap(layer, FastPointwise)
        elif suits_patches(layer):
            patch.swap(layer, FastPatches)


# ---- attention


def fast_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    if causal or not readable(q, k, v):
        return attention(q, k, v, causal)
    return native.attention(q, k, v)


@optimization(
    "cpu-attention",
    stage=Stage.ATTENTION,
    exact=True,
    summary="attention in C++",
    needs=KERNELS,
    conflicts=("compile",),
)
def cpu_attention(patch: Patch) -> None:
    """Attention by the C++ kernels, without a causal mask: the UNet's and the VAE's. Exact.

    Helps: heads of 40 and many positions. Hurts: CPUs without AVX2, for which nothing is tuned. What attends in bf16 by
    cpu-bf16 or cpu-int8 stays.
    """
    for model in (patch.unet, patch.vae):
        for module in model.modules():
            if isinstance(module, (CrossAttention, AttnBlock)) and module.attend is not dot_attention:
                patch.set(module, "attend", fast_attention, label="C++")


# ---- norms, and the residual blocks around them


class FastGroupNorm(nn.GroupNorm):
    kernel = "C++"

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(self, x, silu=False)


def group_norm(norm: nn.GroupNorm, x: Tensor, silu: bool, in_place: bool = False) -> Tensor:
    """in_place: x is nobody else's, and may be overwritten."""
    if readable(x, norm.weight) and x.shape[1] % native.vector() == 0:
        return native.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu, in_place)
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(y) if silu else y


class FastLayerNorm(nn.LayerNorm):
    kernel = "C++"

    def forward(self, x: Tensor) -> Tensor:
        if not readable(x, self.weight) or x.shape[-1] % native.vector():
            return super().forward(x)
        return native.layer_norm(x, self.weight, self.bias, self.eps)


class FastResBlock(ResBlock):
    kernel = "C++"

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = group_norm(self.in_layers[0], x, silu=True)
        h = added(self.in_layers[2], h, shift=self.emb_layers(emb))
        h = group_norm(self.out_layers[0], h, silu=True, in_place=True)
        return added(self.out_layers[3], h, residual=self.skip_connection(x))


class FastResnetBlock(ResnetBlock):
    kernel = "C++"

    def forward(self, x: Tensor) -> Tensor:
        h = added(self.conv1, group_norm(self.norm1, x, silu=True))
        h = group_norm(self.norm2, h, silu=True, in_place=True)
        return added(self.conv2, h, residual=self.nin_shortcut(x))


FAST = {
    nn.GroupNorm: FastGroupNorm,
    nn.LayerNorm: FastLayerNorm,
    ResBlock: FastResBlock,
    ResnetBlock: FastResnetBlock,
}


@optimization(
    "cpu-norm",
    stage=Stage.BLOCKS,
    exact=True,
    summary="norms with SiLU in C++",
    needs=KERNELS,
    conflicts=("compile", "fused-norm", "fused-layernorm"),
)
def cpu_norm(patch: Patch) -> None:
    """Norms by the C++ kernels, SiLU within; Winograd convolutions add timestep and residual themselves. Exact.

    Helps: each was a pass over memory. Hurts: without channels-last, where each activation is copied first.
    """
    for plain, fast in FAST.items():
        for module in patch.modules(plain, patch.unet, patch.vae):
            patch.swap(module, fast)

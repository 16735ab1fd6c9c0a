"""Modules of the UNet and the VAE whose arithmetic is in sd/kernels/cpp: fewer passes over memory, odd shapes fast.

    cpu-linear      linear layers, 1x1 and strided convolutions; GEGLU without its projection ever in memory
    cpu-attention   attention a chunk of keys at a time
    cpu-norm        GroupNorm with SiLU, LayerNorm; residual blocks whose convolutions add timestep and residual

Each class leaves its parameters as they are, and falls back to what it inherits for what the kernels do not take.
Axes: B batch, C channels, H W grid.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from sd.attention import attention
from sd.kernels import native as cpu_kernels
from sd.kernels.native import readable
from sd.unet import GEGLU, CrossAttention, ResBlock
from sd.vae import AttnBlock, ResnetBlock
from sd.winograd import WinogradConv

# ---- linear layers


class FastLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if not readable(x, self.weight):
            return super().forward(x)
        return cpu_kernels.linear(x, self.weight, self.bias)


class FastGEGLU(GEGLU):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.proj.weight
        if not readable(x, weight) or weight.shape[0] % cpu_kernels.panel():
            return super().forward(x)
        return cpu_kernels.geglu(x, weight, self.proj.bias)


class FastPointwise(nn.Conv2d):
    """A 1x1 convolution as a product over positions."""

    def forward(self, x: Tensor) -> Tensor:
        if not readable(x, self.weight):
            return super().forward(x)
        rows = x.permute(0, 2, 3, 1).contiguous()
        return cpu_kernels.linear(rows, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class FastPatches(nn.Conv2d):
    """A 3x3 convolution as a product of patches with the weights as they are."""

    def forward(self, x: Tensor) -> Tensor:
        if not readable(x, self.weight):
            return super().forward(x)
        return cpu_kernels.conv3x3(x, self.weight, self.bias, self.stride[0])


def suits_patches(layer: nn.Module) -> bool:
    """Whether it is a 3x3 convolution that leaves positions out, or has few channels, so that patches are small."""
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == (3, 3)
        and (layer.padding, layer.dilation, layer.groups) == ((1, 1), (1, 1), 1)
        and (layer.stride == (2, 2) or (layer.stride == (1, 1) and layer.in_channels < 8))
    )


def fast_linear(*models: nn.Module) -> None:
    for module in (m for model in models for m in model.modules()):
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
        elif type(module) is GEGLU:
            module.__class__ = FastGEGLU
        elif isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            module.__class__ = FastPointwise
        elif suits_patches(module):
            module.__class__ = FastPatches


# ---- attention


def fast_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    if causal or not readable(q, k, v):
        return attention(q, k, v, causal)
    return cpu_kernels.attention(q, k, v)


def use_fast_attention(*models: nn.Module) -> None:
    for module in (m for model in models for m in model.modules()):
        if isinstance(module, (CrossAttention, AttnBlock)):
            module.attend = fast_attention


# ---- norms, and the residual blocks around them


class FastGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return group_norm(self, x, silu=False)


def group_norm(norm: nn.GroupNorm, x: Tensor, silu: bool, in_place: bool = False) -> Tensor:
    """in_place: x is nobody else's, and may be overwritten."""
    if readable(x, norm.weight) and x.shape[1] % cpu_kernels.vector() == 0:
        return cpu_kernels.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu, in_place)
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(y) if silu else y


class FastLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        if not readable(x, self.weight) or x.shape[-1] % cpu_kernels.vector():
            return super().forward(x)
        return cpu_kernels.layer_norm(x, self.weight, self.bias, self.eps)


def convolve(conv: nn.Conv2d, x: Tensor, shift: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """conv(x) + shift [B or 1, C] + residual, at once if the convolution can."""
    if isinstance(conv, WinogradConv):
        return conv.run(x, shift, residual)
    y = conv(x)
    y = y if shift is None else y + shift[:, :, None, None]
    return y if residual is None else y + residual


class FastResBlock(ResBlock):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = group_norm(self.in_layers[0], x, silu=True)
        h = convolve(self.in_layers[2], h, shift=self.emb_layers(emb))
        h = group_norm(self.out_layers[0], h, silu=True, in_place=True)
        return convolve(self.out_layers[3], h, residual=self.skip_connection(x))


class FastResnetBlock(ResnetBlock):
    def forward(self, x: Tensor) -> Tensor:
        h = convolve(self.conv1, group_norm(self.norm1, x, silu=True))
        h = group_norm(self.norm2, h, silu=True, in_place=True)
        return convolve(self.conv2, h, residual=self.nin_shortcut(x))


FAST = {
    nn.GroupNorm: FastGroupNorm,
    nn.LayerNorm: FastLayerNorm,
    ResBlock: FastResBlock,
    ResnetBlock: FastResnetBlock,
}


def fast_norms(*models: nn.Module) -> None:
    for module in (m for model in models for m in model.modules()):
        module.__class__ = FAST.get(type(module), type(module))

"""Modules that use the Triton kernels of kernels/gpu*.py in place of the plain ones: fewer passes between products.

    fused-norm        GroupNorm with SiLU, the timestep and the biases around it
    fused-layernorm   LayerNorm with the residual and the biases before it
    fused-geglu       GEGLU's gate with its projection's bias, or with the projection itself
    fused-upsample    nearest-neighbour upsampling
    split-conv        3x3 convolutions of the smallest grid, tap by tap

Each class leaves its parameters as they are, and calls other layers by what their own class says (`without_bias`).
Axes: B batch, L positions, C channels.
"""

import importlib.util
import os
import shutil
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd import gpus, unet, vae
from sd.optimizations.base import Need, Patch, Stage, capability, here, optimization, without_bias
from sd.pipeline import StableDiffusion
from sd.unet import GEGLU, BasicTransformerBlock, ResBlock, SpatialTransformer
from sd.vae import AttnBlock, Decoder, ResnetBlock


def _why_not(pipe: StableDiffusion) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if capability(pipe) < gpus.AMPERE:
        return f"this is {here(pipe)}"
    # Triton compiles the function that launches a kernel.
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    return (
        "" if any(name and shutil.which(name) for name in compilers) else "there is no C compiler: apt-get install gcc"
    )


SM80 = Need(gpus.needed("fused-norm"), _why_not)


def _gpu() -> ModuleType:
    from sd.kernels import gpu  # imports Triton

    return gpu


def _products() -> ModuleType:
    from sd.kernels import gpu_products  # imports Triton

    return gpu_products


# ---- modules


class FusedGroupNorm(nn.GroupNorm):
    kernel = "Triton"
    gpu: ModuleType

    def forward(self, x: Tensor) -> Tensor:
        return self.gpu.group_norm(x, self)


class FusedGroupNormSiLU(nn.GroupNorm):
    """Stands for a GroupNorm and the SiLU after it, which becomes an identity."""

    kernel = "Triton, with SiLU"
    gpu: ModuleType

    def forward(self, x: Tensor) -> Tensor:
        return self.gpu.group_norm(x, self, silu=True)


class FusedResBlock(ResBlock):
    """The first convolution's bias and the timestep enter with the second norm, the others with the residual."""

    kernel = "Triton norms and sums"
    gpu: ModuleType

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm1, conv1 = self.in_layers[0], self.in_layers[-1]
        norm2, conv2 = self.out_layers[0], self.out_layers[-1]
        h, bias = without_bias(conv1, self.gpu.group_norm(x, norm1, silu=True))
        h = self.gpu.group_norm(h, norm2, silu=True, shift=self.emb_layers(emb), bias=bias)
        h, bias = without_bias(conv2, h)
        return _with_skip(self.gpu, h, bias, x, self.skip_connection)


class FusedResnetBlock(ResnetBlock):
    """The same for the VAE's block, which knows no timestep."""

    kernel = "Triton norms and sums"
    gpu: ModuleType

    def forward(self, x: Tensor) -> Tensor:
        h, bias = without_bias(self.conv1, self.gpu.group_norm(x, self.norm1, silu=True))
        h, bias = without_bias(self.conv2, self.gpu.group_norm(h, self.norm2, silu=True, bias=bias))
        return _with_skip(self.gpu, h, bias, x, self.nin_shortcut)


def _with_skip(gpu: ModuleType, h: Tensor, bias: Tensor | None, x: Tensor, skip: nn.Module) -> Tensor:
    """h + bias + skip(x), where skip is a 1x1 convolution or an identity; a bias of None is in h already."""
    residual, skip_bias = (x, None) if isinstance(skip, nn.Identity) else without_bias(skip, x)
    return _sum(gpu, h, residual, bias, skip_bias)


def _sum(gpu: ModuleType, x: Tensor, residual: Tensor, *biases: Tensor | None) -> Tensor:
    left = [bias for bias in biases if bias is not None]
    return gpu.add_bias(x, residual, *left) if left else x + residual


class FusedDecoder(Decoder):
    """The last norm and its SiLU in one; the rest is in the blocks."""

    kernel = "Triton norm"
    gpu: ModuleType

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.gpu.group_norm(x, self.norm_out, silu=True))


class FusedUnetUpsample(unet.Upsample):
    kernel = "Triton"
    gpu: ModuleType

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.gpu.upsample(x))


class FusedVaeUpsample(vae.Upsample):
    kernel = "Triton"
    gpu: ModuleType

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.gpu.upsample(x))


class WithoutBias(nn.Linear):
    """A Linear layer whose bias is left to the kernel that follows."""

    kernel = "its bias with what follows"

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class FusedSpatialTransformer(SpatialTransformer):
    """The projections' biases enter with the first LayerNorm and with the residual; the blocks are fused ones."""

    kernel = "Triton sums"
    gpu: ModuleType

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h, bias = without_bias(self.proj_in, self.norm(x))
        height, width = h.shape[-2:]
        h = h.flatten(2).transpose(1, 2)  # [B, L, C]
        for block in self.transformer_blocks:
            h, bias = block(h, context, bias), None
        h, bias = without_bias(self.proj_out, h.transpose(1, 2).unflatten(2, (height, width)))
        return _sum(self.gpu, h, x, bias)


class FusedTransformerBlock(BasicTransformerBlock):
    """Each residual connection, and the biases before it, in one pass with the LayerNorm after it.

    The last layers of the attentions are `WithoutBias`.
    """

    kernel = "Triton norms and sums"
    gpu: ModuleType

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        """bias [C] is what the layer before left out of x."""
        last, normed = self.ff.net[2], self.gpu.add_layer_norm
        x, h = normed(x, self.norm1, bias=bias)
        x, h = normed(x, self.norm2, self.attn1(h), self.attn1.to_out[0].bias)
        x, h = normed(x, self.norm3, self.attn2(h, context), self.attn2.to_out[0].bias, after=last.bias)
        return self.gpu.accumulate(last, self.ff.net[0](h), x)


class FusedGEGLU(GEGLU):
    """`proj` is `WithoutBias`. products: the kernels that multiply as well, or None where they cannot run."""

    kernel = "Triton"
    gpu: ModuleType
    products: ModuleType | None

    def forward(self, x: Tensor) -> Tensor:
        if self.products and self.products.geglu_pays(x) and self._is_plain_product():
            return self.products.geglu_product(x, self.proj.weight, self.proj.bias)
        return self.gpu.geglu(self.proj(x), self.proj.bias)

    def _is_plain_product(self) -> bool:
        """Not of quantized weights, nor where a compiler would have to trace the making of TMA's descriptors."""
        return type(self.proj.weight) is nn.Parameter and not torch.compiler.is_compiling()


class SplitConv(nn.Conv2d):
    """A 3x3 convolution, tap by tap where the grid is so small that cuDNN leaves most of the chip idle."""

    kernel = "Triton, by taps, or cuDNN"
    products: ModuleType

    def forward(self, x: Tensor) -> Tensor:
        return self._convolved(x, self.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        return self._convolved(x, None)

    def _convolved(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.products.conv_pays(x):
            return self.products.conv3x3_split(x, self.weight, bias)
        return self._conv_forward(x, self.weight, bias)


# ---- the switches


@optimization(
    "fused-norm",
    stage=Stage.BLOCKS,
    exact=True,
    summary="GroupNorm, SiLU and biases in one kernel",
    needs=SM80,
)
def fused_norm(patch: Patch) -> None:
    """GroupNorm, SiLU, the timestep's shift and the convolutions' biases in Triton kernels on channels-last. Exact.

    Helps: each was a pass over memory of its own. Hurts: without channels-last, where each activation is copied first.
    """
    gpu = _gpu()
    for plain, fused in ((ResBlock, FusedResBlock), (ResnetBlock, FusedResnetBlock)):
        for block in patch.modules(plain):
            patch.swap(block, fused, gpu=gpu)
            patch.within(*(part for part in block.modules() if type(part) is nn.GroupNorm))
    for module in [m for model in (patch.unet, patch.vae) for m in model.modules()]:
        if isinstance(module, SpatialTransformer | AttnBlock):
            patch.swap(module.norm, FusedGroupNorm, gpu=gpu)
    if hasattr(patch.unet, "out"):  # a ControlNet has none
        patch.swap(patch.unet.out[0], FusedGroupNormSiLU, gpu=gpu)
        patch.swap(patch.unet.out[1], nn.Identity)
    for decoder in [module for module in patch.vae.modules() if isinstance(module, Decoder)]:
        patch.swap(decoder, FusedDecoder, gpu=gpu)
        patch.within(decoder.norm_out)


@optimization(
    "fused-layernorm",
    stage=Stage.BLOCKS,
    exact=True,
    summary="residual and LayerNorm in one kernel",
    needs=SM80,
    conflicts=("cpu-linear",),
)
def fused_layernorm(patch: Patch) -> None:
    """LayerNorm of the transformer blocks in one Triton kernel with the residual and the biases before it. Exact.

    Helps: fewer passes over memory, and products that do not add their bias themselves, at which cuBLAS is slow.
    Hurts: without channels-last, where each activation is copied first.
    """
    gpu = _gpu()
    for transformer in patch.modules(SpatialTransformer, patch.unet):
        patch.swap(transformer, FusedSpatialTransformer, gpu=gpu)
    for block in patch.modules(BasicTransformerBlock, patch.unet):
        patch.swap(block, FusedTransformerBlock, gpu=gpu)
        patch.within(block.norm1, block.norm2, block.norm3)
        for layer in (block.attn1.to_out[0], block.attn2.to_out[0]):
            patch.swap(layer, WithoutBias)


@optimization(
    "fused-geglu",
    stage=Stage.BLOCKS,
    exact=True,
    summary="GEGLU's gate in one kernel",
    needs=SM80,
    conflicts=("cpu-linear",),
)
def fused_geglu(patch: Patch) -> None:
    """The feed-forward's value * gelu(gate) in one Triton kernel, with the projection's bias. Exact.

    Where there are many rows, and TMA (sm90 or newer), the same kernel multiplies too, and neither half of the
    projection is ever written. Helps: the largest activations of the UNet, not read twice. Hurts: nothing known.
    """
    gpu, products = _gpu(), _products() if _has_tma(patch.pipe) else None
    for layer in patch.modules(GEGLU, patch.unet):
        patch.swap(layer, FusedGEGLU, gpu=gpu, products=products)
        patch.swap(layer.proj, WithoutBias)


@optimization(
    "fused-upsample",
    stage=Stage.BLOCKS,
    exact=True,
    summary="upsampling at the memory's speed",
    needs=SM80,
    conflicts=("winograd",),
)
def fused_upsample(patch: Patch) -> None:
    """Nearest-neighbour upsampling by a Triton kernel that moves 16 bytes at a time. Exact, to the bit.

    Helps: the VAE, whose pictures are large. Hurts: without channels-last, where each activation is copied first.
    """
    gpu = _gpu()
    for plain, fused in ((unet.Upsample, FusedUnetUpsample), (vae.Upsample, FusedVaeUpsample)):
        for module in patch.modules(plain, patch.unet, patch.vae):
            patch.swap(module, fused, gpu=gpu)


def _has_tma(pipe: StableDiffusion) -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" or capability(pipe) >= (9, 0)


@optimization(
    "split-conv",
    stage=Stage.LAYERS,
    exact=True,
    summary="3x3 convolutions of the smallest grid, tap by tap",
    needs=SM80,
    conflicts=("winograd", "cpu-bf16", "cpu-int8"),
)
def split_conv(patch: Patch) -> None:
    """3x3 convolutions of up to 128 positions by a Triton kernel that makes each of the nine taps programs. Exact.

    Helps: the middle of the UNet at 512x512 and batch 1, where cuDNN's few programs wait for the weights. Elsewhere the
    convolution is cuDNN's as before. Hurts: without channels-last, where each activation is copied first.
    """
    products = _products()
    for conv in patch.modules(nn.Conv2d, patch.unet):
        whole = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.padding == (1, 1)
        if whole and conv.in_channels % products.CONV_TILE.k == 0:
            patch.swap(conv, SplitConv, products=products)

"""Modules whose norms, activations, residuals and biases are the Triton kernels of sd/kernels/gpu.py.

Axes: B batch, L = H*W positions, C channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from sd import unet, vae
from sd.kernels import gpu
from sd.unet import GEGLU, BasicTransformerBlock, ResBlock, SpatialTransformer, UNet
from sd.vae import VAE, AttnBlock, Decoder, ResnetBlock


def _without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding)


class WithoutBias(nn.Linear):
    """A Linear layer whose bias is left to the kernel that follows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


# ---- the modules: plain ones with another forward, the same parameters under the same names


class FusedGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return gpu.group_norm(x, self)


class FusedGroupNormSiLU(nn.GroupNorm):
    """Stands for a GroupNorm and the SiLU after it, which becomes an identity."""

    def forward(self, x: Tensor) -> Tensor:
        return gpu.group_norm(x, self, silu=True)


class FusedResBlock(ResBlock):
    """The first convolution's bias and the timestep enter with the second norm, the others with the residual."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm1, conv1 = self.in_layers[0], self.in_layers[-1]
        norm2, conv2 = self.out_layers[0], self.out_layers[-1]
        h = _without_bias(conv1, gpu.group_norm(x, norm1, silu=True))
        h = gpu.group_norm(h, norm2, silu=True, shift=self.emb_layers(emb), bias=conv1.bias)
        return _add_skip(_without_bias(conv2, h), conv2.bias, x, self.skip_connection)


class FusedResnetBlock(ResnetBlock):
    """The same for the VAE's block, which knows no timestep."""

    def forward(self, x: Tensor) -> Tensor:
        h = _without_bias(self.conv1, gpu.group_norm(x, self.norm1, silu=True))
        h = _without_bias(self.conv2, gpu.group_norm(h, self.norm2, silu=True, bias=self.conv1.bias))
        return _add_skip(h, self.conv2.bias, x, self.nin_shortcut)


def _add_skip(h: Tensor, bias: Tensor, x: Tensor, skip: nn.Module) -> Tensor:
    """h + bias + skip(x), where skip is a 1x1 convolution or an identity."""
    if isinstance(skip, nn.Conv2d):
        return gpu.add_bias(h, _without_bias(skip, x), bias, skip.bias)
    return gpu.add_bias(h, x, bias)


class FusedDecoder(Decoder):
    """The last norm and its SiLU in one; the rest is in the blocks."""

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(gpu.group_norm(x, self.norm_out, silu=True))


class FusedUnetUpsample(unet.Upsample):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(gpu.upsample(x))


class FusedVaeUpsample(vae.Upsample):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(gpu.upsample(x))


class FusedSpatialTransformer(SpatialTransformer):
    """The projections' biases enter with the first LayerNorm and with the residual; the blocks are fused ones."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = _without_bias(self.proj_in, self.norm(x))
        height, width = h.shape[-2:]
        h, bias = h.flatten(2).transpose(1, 2), self.proj_in.bias  # [B, L, C]
        for block in self.transformer_blocks:
            h, bias = block(h, context, bias), None
        h = h.transpose(1, 2).unflatten(2, (height, width))
        return gpu.add_bias(_without_bias(self.proj_out, h), x, self.proj_out.bias)


class FusedTransformerBlock(BasicTransformerBlock):
    """Each residual connection, and the biases before it, in one pass with the LayerNorm after it.

    The last layers of the attentions and of the feed-forward are `WithoutBias`.
    """

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        """bias [C] is what the layer before left out of x."""
        last = self.ff.net[2]
        x, h = gpu.add_layer_norm(x, self.norm1, bias=bias)
        x, h = gpu.add_layer_norm(x, self.norm2, self.attn1(h), self.attn1.to_out[0].bias)
        x, h = gpu.add_layer_norm(x, self.norm3, self.attn2(h, context), self.attn2.to_out[0].bias, after=last.bias)
        return gpu.accumulate(last, self.ff.net[0](h), x)


class FusedGEGLU(GEGLU):
    """`proj` is `WithoutBias`."""

    def forward(self, x: Tensor) -> Tensor:
        return gpu.geglu(self.proj(x), self.proj.bias)


def fuse_norms(unet_model: UNet, vae_model: VAE) -> None:
    for block in _of(ResBlock, unet_model):
        block.__class__ = FusedResBlock
    for transformer in _of(SpatialTransformer, unet_model):
        transformer.norm.__class__ = FusedGroupNorm
    unet_model.out[0].__class__ = FusedGroupNormSiLU
    unet_model.out[1].__class__ = nn.Identity
    for block in _of(ResnetBlock, vae_model):
        block.__class__ = FusedResnetBlock
    for block in _of(AttnBlock, vae_model):
        block.norm.__class__ = FusedGroupNorm
    vae_model.decoder.__class__ = FusedDecoder


def fuse_transformers(model: UNet) -> None:
    for transformer in _of(SpatialTransformer, model):
        transformer.__class__ = FusedSpatialTransformer
    for block in _of(BasicTransformerBlock, model):
        block.__class__ = FusedTransformerBlock
        for layer in (block.attn1.to_out[0], block.attn2.to_out[0]):
            layer.__class__ = WithoutBias


def fuse_geglu(model: UNet) -> None:
    for layer in _of(GEGLU, model):
        layer.__class__ = FusedGEGLU
        layer.proj.__class__ = WithoutBias


def fuse_upsampling(unet_model: UNet, vae_model: VAE) -> None:
    for layer in _of(unet.Upsample, unet_model):
        layer.__class__ = FusedUnetUpsample
    for layer in _of(vae.Upsample, vae_model):
        layer.__class__ = FusedVaeUpsample


def _of(kind: type[nn.Module], model: nn.Module) -> list:
    return [module for module in model.modules() if isinstance(module, kind)]

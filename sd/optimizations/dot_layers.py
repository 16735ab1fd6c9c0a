"""Modules of the UNet and the VAE whose products are of short numbers (sd/kernels/dots.py), and all else in fp32.

A layer packs its weights when it first runs, and again after they were written to; the weights themselves stay where
they are, mapped from the checkpoint's file where they were. What is between two products, a norm, SiLU, upsampling, is
done while the second one's numbers are made. Activations that only a product reads are bf16, the others fp32.

Axes: B batch, L positions, C channels, H W grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd import unet, vae
from sd.attention import attention, merge_heads, split_heads
from sd.checkpoints.mapped import mapped, page_out
from sd.checkpoints.stamps import Stamp
from sd.kernels import dots
from sd.kernels.dots import Grid, Panels
from sd.unet import GEGLU, BasicTransformerBlock, CrossAttention, ResBlock, SpatialTransformer
from sd.vae import AttnBlock, Decoder, Encoder, ResnetBlock


class Packed:
    """The panels of one or more weights that multiply the same numbers, made when needed and after they changed."""

    def __init__(self, layers: tuple[nn.Module, ...], kind: str = "bf16", geglu: bool = False):
        self.layers = layers
        self.kind = kind
        self.geglu = geglu
        self.panels: Panels | None = None
        self.bias: Tensor | None = None
        self.stamp: Stamp | None = None

    def __call__(self) -> Panels:
        parameters = [p for layer in self.layers for p in layer.parameters()]
        current = Stamp(parameters)
        if current != self.stamp:
            weights = [layer.weight.detach() for layer in self.layers]
            self.panels = dots.pack(weights[0] if len(weights) == 1 else torch.cat(weights), self.kind, self.geglu)
            biases = [layer.bias for layer in self.layers if layer.bias is not None]
            self.bias = torch.cat(biases).float() if biases else None
            self.stamp = Stamp(parameters)
            for weight in mapped(weights):
                page_out(weight)
        return self.panels


def called_otherwise(layer: nn.Module) -> bool:
    """Whether something is around a module's forward, which then must be called as it is."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


class DotLinear(nn.Linear):
    """out: the results' type."""

    packed: Packed
    out: torch.dtype

    @property
    def kernel(self) -> str:
        return f"C++ {self.packed.kind}"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] in fp32; or in bf16, as `dots.rows` pads it or not -> [..., C_out]."""
        return self.added(x)

    def added(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same plus residual [..., C_out] in fp32."""
        panels = self.packed()
        return dots.linear(rows(x, panels), panels, self.packed.bias, residual, out=self.out)


def rows(x: Tensor, panels: Panels) -> Tensor:
    """x as the left side of a product, of as many numbers as its weights have."""
    if x.dtype == torch.bfloat16 and panels.kind == "bf16":
        missing = -panels.inner % (dots.sizes().row // 2)
        return F.pad(x, (0, missing)) if missing and x.shape[-1] == panels.inner else x
    return dots.rows(x.float(), panels.kind)


class DotConv(nn.Conv2d):
    """A 3x3 or 1x1 convolution. moved: its padding is to the right and below alone, of one position."""

    packed: Packed
    moved: bool

    @property
    def kernel(self) -> str:
        return f"C++ {self.packed.kind}"

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x)

    def after(
        self,
        x: Tensor,
        norm: nn.GroupNorm | None = None,
        silu: bool = False,
        upsampled: bool = False,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        out: torch.dtype = torch.float32,
    ) -> Tensor:
        """The convolution of x [B, C, H, W], after what is said, plus shift [B or 1, C_out] plus residual."""
        panels = self.packed()
        made = dots.grid(x.float(), panels.kind, None, norm, silu, upsampled)
        bias = self.packed.bias
        if shift is not None:
            bias = shift if bias is None else shift + bias
        return dots.conv(made, panels, bias, residual, out, self.stride[0], self.moved)


def conv_after(
    conv: nn.Module,
    x: Tensor,
    norm: nn.GroupNorm | None = None,
    silu: bool = False,
    upsampled: bool = False,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`DotConv.after`, or the same step by step where something is around the convolution."""
    if isinstance(conv, DotConv) and not called_otherwise(conv):
        return conv.after(x, norm, silu, upsampled, shift, residual)
    x = x if norm is None else norm(x)
    x = F.silu(x) if silu else x
    y = conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if upsampled else x)
    y = y if shift is None else y + shift[:, :, None, None]
    return y if residual is None else y + residual


# ---- the UNet's


class DotResBlock(ResBlock):
    kernel = "C++ norms within the products"

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = conv_after(self.in_layers[2], x, self.in_layers[0], silu=True, shift=self.emb_layers(emb))
        return conv_after(self.out_layers[3], h, self.out_layers[0], silu=True, residual=self.skip_connection(x))


class DotSpatialTransformer(SpatialTransformer):
    kernel = "C++ norm within the product"

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = conv_after(self.proj_in, x, self.norm)
        height, width = h.shape[-2:]
        h = h.flatten(2).transpose(1, 2)  # [B, L, C]
        for block in self.transformer_blocks:
            h = block(h, context)
        return conv_after(self.proj_out, h.transpose(1, 2).unflatten(2, (height, width)), residual=x)


class DotTransformerBlock(BasicTransformerBlock):
    kernel = "C++ norms within the products"

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = plus_attention(x, self.norm1, self.attn1)
        x = plus_attention(x, self.norm2, self.attn2, context)
        gated = self.ff.net[0](dots.rows(x, "bf16", self.norm3))
        return self.ff.net[2].added(gated, x)


def plus_attention(x: Tensor, norm: nn.LayerNorm, attend: CrossAttention, *context: Tensor) -> Tensor:
    h = dots.rows(x, "bf16", norm)
    if called_otherwise(attend) or called_otherwise(attend.to_out):
        return x + attend(h, *context)
    return attend.to_out[0].added(attend.attended(h, *context), x)


class DotGEGLU(GEGLU):
    packed: Packed

    @property
    def kernel(self) -> str:
        return f"C++ {self.packed.kind}"

    def forward(self, x: Tensor) -> Tensor:
        panels = self.packed()
        return dots.linear(rows(x, panels), panels, self.packed.bias, out=torch.bfloat16)


class DotSelfAttention(CrossAttention):
    """q, k and v by one product."""

    kernel = "one product for q, k, v"
    packed: Packed

    def attended(self, x: Tensor, context: None = None) -> Tensor:
        panels = self.packed()
        qkv = dots.linear(rows(x, panels), panels, out=torch.bfloat16)
        q, k, v = (split_heads(part, self.heads) for part in qkv.chunk(3, dim=-1))
        return merge_heads(self.attend(q, k, v))


def dot_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    if causal or q.shape[-1] % 2 or q.dtype != torch.bfloat16:
        return attention(q, k, v, causal)
    return dots.attention(q, k, v)


class DotUpsample(unet.Upsample):
    """The VAE's is the same."""

    kernel = "within its convolution"

    def forward(self, x: Tensor) -> Tensor:
        return conv_after(self.conv, x, upsampled=True)


class DotHead(nn.Sequential):
    """GroupNorm, SiLU and a convolution."""

    kernel = "C++ norm within the product"

    def forward(self, x: Tensor) -> Tensor:
        return conv_after(self[2], x, self[0], silu=True)


# ---- the VAE's


class DotResnetBlock(ResnetBlock):
    kernel = "C++ norms within the products"

    def forward(self, x: Tensor) -> Tensor:
        h = conv_after(self.conv1, x, self.norm1, silu=True)
        return conv_after(self.conv2, h, self.norm2, silu=True, residual=self.nin_shortcut(x))


class DotAttnBlock(AttnBlock):
    """q, k and v by one product, after the norm."""

    kernel = "one product for q, k, v"
    packed: Packed
    last: Packed

    def forward(self, x: Tensor) -> Tensor:
        panels = self.packed()
        made: Grid = dots.grid(x, panels.kind, norm=self.norm)
        qkv = dots.conv(made, panels, self.packed.bias, out=torch.bfloat16)
        q, k, v = (part.transpose(1, 2)[:, None] for part in qkv.flatten(2).chunk(3, dim=1))  # [B, 1, L, C]
        h = self.attend(q, k, v)[:, 0]
        residual = x.permute(0, 2, 3, 1).flatten(1, 2)
        y = dots.linear(rows(h, self.last()), self.last(), self.last.bias, residual)
        return y.transpose(1, 2).unflatten(2, x.shape[-2:])


class DotDownsample(vae.Downsample):
    """The padding to the right and below is the convolution's own."""

    kernel = "its padding within the convolution"

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class DotEncoder(Encoder):
    kernel = "C++ norm within the product"

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return conv_after(self.conv_out, self.mid(x), self.norm_out, silu=True)


class DotDecoder(Decoder):
    kernel = "C++ norm within the product"

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return conv_after(self.conv_out, x, self.norm_out, silu=True)


BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    ResBlock: DotResBlock,
    SpatialTransformer: DotSpatialTransformer,
    BasicTransformerBlock: DotTransformerBlock,
    unet.Upsample: DotUpsample,
    vae.Upsample: DotUpsample,
    ResnetBlock: DotResnetBlock,
    vae.Downsample: DotDownsample,
    Encoder: DotEncoder,
    Decoder: DotDecoder,
}
"""Blocks of layers whose class is all that changes."""

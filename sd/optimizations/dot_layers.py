"""Modules of the UNet and the VAE whose products are of short numbers (sd/kernels/dots.py), and all else in fp32.

A layer packs its weights when it first runs, and again after they were written to; the weights themselves stay where
they are, mapped from the checkpoint's file where they were. What is between two products, a norm, SiLU, upsampling, is
done while the second one's numbers are made. Activations that only a product reads are bf16, the others fp32.

Axes: B batch, L positions, C channels, H W grid.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd import unet, vae
from sd.attention import attention, merge_heads, split_heads
from sd.checkpoints.mapped import mapped, page_out
from sd.checkpoints.stamps import Stamp
from sd.kernels import dots, native
from sd.kernels.dots import Grid, Panels, Scale
from sd.optimizations.base import CPU, Need, Patch, assign
from sd.unet import GEGLU, BasicTransformerBlock, CrossAttention, ResBlock, SpatialTransformer
from sd.vae import AttnBlock, Decoder, Encoder, ResnetBlock


class Packed:
    """The product with one or more weights that multiply the same numbers: their panels, made when needed and after
    they changed, and the left side that these take.

    quantized: of int8, how the left side is scaled. observe: while that is not known yet, what is shown each left side.
    """

    def __init__(self, layers: tuple[nn.Module, ...], geglu: bool = False):
        self.layers = layers
        self.geglu = geglu
        self.quantized: Scale | None = None
        self.observe: Callable[[Tensor], object] | None = None
        self.bias: Tensor | None = None
        self._panels: Panels | None = None
        self._stamp: Stamp | None = None

    @property
    def kind(self) -> str:
        return "bf16" if self.quantized is None else "int8"

    @property
    def panels(self) -> Panels:
        parameters = [p for layer in self.layers for p in layer.parameters()]
        if self._panels is None or Stamp(parameters) != self._stamp:
            weights = [layer.weight.detach() for layer in self.layers]
            weight = weights[0] if len(weights) == 1 else torch.cat(weights)
            self._panels = dots.pack(weight, self.kind, self.geglu, self.quantized)
            biases = [layer.bias for layer in self.layers if layer.bias is not None]
            self.bias = torch.cat(biases).float() if biases else None
            self._stamp = Stamp(parameters)
            for weight in mapped(weights):
                page_out(weight)
        return self._panels

    @property
    def inner(self) -> int:
        """Numbers of a row of the left side."""
        return self.layers[0].weight.shape[1]

    @property
    def padding(self) -> int:
        """And those after them, to the end of a block."""
        return dots.padded(self.inner, self.kind) - self.inner

    def quantize(self, scale: Scale) -> None:
        """From now on in int8, the left side scaled by this."""
        self.quantized, self._panels = scale, None

    def rows(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """x [..., C] in fp32 or bf16, after a norm, as this product's left side; what is one already stays as it is."""
        if x.dtype == torch.uint8:
            return x
        if norm is None and x.dtype == torch.bfloat16 and self.kind == "bf16" and not self.observe:
            missing = self.inner + self.padding - x.shape[-1]
            return F.pad(x, (0, missing)) if missing else x
        x = x[..., : self.inner]  # without the zeros to the end of a block
        if self.observe:
            self.observe(x.float() if norm is None else norm(x))
        return dots.rows(x, self.kind, norm, self.quantized)

    def grid(self, x: Tensor, norm: nn.GroupNorm | None = None, silu: bool = False, upsampled: bool = False) -> Grid:
        """x [B, C, H, W], after what is said, as this product's left side."""
        x = x.float()
        if self.observe:
            made = x if norm is None else norm(x)
            self.observe(F.silu(made) if silu else made)
        return dots.grid(x, self.kind, None, norm, silu, upsampled, self.quantized)


def called_otherwise(layer: nn.Module) -> bool:
    """Whether something is around a module's forward, which then must be called as it is."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


class Product(nn.Module):
    """A layer that is one product."""

    packed: Packed

    @property
    def kernel(self) -> str:
        """For `explain`."""
        return f"C++ {self.packed.kind}"


class DotLinear(Product, nn.Linear):
    """out: the results' type."""

    out: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] in fp32 or bf16, or as `packed.rows` made it -> [..., C_out]."""
        return self.added(x)

    def added(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same plus residual [..., C_out] in fp32."""
        packed = self.packed
        return dots.linear(packed.rows(x), packed.panels, packed.bias, residual, out=self.out)


class DotConv(Product, nn.Conv2d):
    """A 3x3 or 1x1 convolution. moved: its padding is to the right and below alone, of one position."""

    moved: bool

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
    ) -> Tensor:
        """The convolution of x [B, C, H, W], after what is said, plus shift [B or 1, C_out] plus residual."""
        packed = self.packed
        made, panels, bias = packed.grid(x, norm, silu, upsampled), packed.panels, packed.bias
        if shift is not None:
            bias = shift if bias is None else shift + bias
        return dots.conv(made, panels, bias, residual, stride=self.stride[0], moved=self.moved)


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
        gate, last = self.ff.net[0], self.ff.net[2]
        return last.added(gate(gate.packed.rows(x, self.norm3)), x)


def plus_attention(x: Tensor, norm: nn.LayerNorm, attend: CrossAttention, *context: Tensor) -> Tensor:
    """x [B, L, C] in fp32, plus the attention of its norm to itself, or to context [B, S, context_dim]."""
    if called_otherwise(attend) or called_otherwise(attend.to_out):
        return x + attend(dots.rows(x, "bf16", norm)[..., : x.shape[-1]], *context)
    first = attend.packed if isinstance(attend, DotSelfAttention) else attend.to_q.packed
    return attend.to_out[0].added(attend.attended(first.rows(x, norm), *context), x)


class DotGEGLU(Product, GEGLU):
    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed
        return dots.linear(packed.rows(x), packed.panels, packed.bias, out=torch.bfloat16)


class DotSelfAttention(CrossAttention):
    """q, k and v by one product."""

    kernel = "one product for q, k, v"
    packed: Packed

    def attended(self, x: Tensor, context: None = None) -> Tensor:
        qkv = dots.linear(self.packed.rows(x), self.packed.panels, out=torch.bfloat16)
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
        packed, last = self.packed, self.last
        qkv = dots.conv(packed.grid(x, self.norm), packed.panels, packed.bias, out=torch.bfloat16)
        q, k, v = (part.transpose(1, 2)[:, None] for part in qkv.flatten(2).chunk(3, dim=1))  # [B, 1, L, C]
        h = self.attend(q, k, v)[:, 0]
        y = dots.linear(last.rows(h), last.panels, last.bias, x.permute(0, 2, 3, 1).flatten(1, 2))
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


# ---- putting them in


def why_not_here() -> str:
    """Why this machine does not multiply short numbers faster than fp32's; "" if it does."""
    if missing := native.why_not():
        return missing
    return "" if dots.fast() else f"this one has neither ({native.instruction_set()}): fp32 is faster here"


BESIDE_NONE = (
    *("fp16", "bf16", "compile", "channels-last", "pointwise-linear", "prepacked"),
    *("attention", "naive", "packed-qkv"),
    *("int8-weights", "int8-dynamic", "int8-static", "float8"),
)
"""Switches that do the same work another way, or read the weights."""
SHORT = Need("a CPU with AMX or AVX512-BF16, and a C++ compiler", lambda pipe: CPU.why_not(pipe) or why_not_here())


def with_vae() -> bool:
    """Whether the VAE's products are short numbers' too: not without AMX, where Winograd's way in fp32 is faster.

    A decoding to 512x512 on 2 cores of Zen 5: 2.8 s in bf16, at 970 of the 1,040 GFLOP/s that there are; 1.9 s in fp32.
    """
    return native.instruction_set() == "amx"


def put_in(patch: Patch) -> None:
    """Give the UNet these layers and blocks, and the VAE where that is worth it, all in bf16; the rest is in fp32."""
    models = (patch.unet, patch.vae) if with_vae() else (patch.unet,)
    layers = dict(_layers(models))
    for layer, kind in layers.items():
        own = {"moved": False} if kind is DotConv else {"out": torch.float32}
        patch.swap(layer, kind, packed=Packed((layer,)), **own)
    for plain, fast in BLOCKS.items():
        for module in patch.modules(plain, *models):
            patch.swap(module, fast)
            if plain is vae.Downsample:
                patch.set(module.conv, "moved", True)
    for block in patch.modules(DotTransformerBlock, patch.unet):
        _attention(patch, block.attn1, block.attn2)
        gate = block.ff.net[0]
        patch.swap(gate, DotGEGLU, packed=Packed((gate.proj,), geglu=True))
        patch.within(gate.proj)
    for module in patch.modules(AttnBlock, *models):
        projections = module.q, module.k, module.v
        patch.swap(module, DotAttnBlock, packed=Packed(projections), last=Packed((module.proj_out,)))
        patch.set(module, "attend", dot_attention, label="C++ bf16")
        patch.within(*projections, module.proj_out)
    if hasattr(patch.unet, "out"):  # a ControlNet has none
        patch.swap(patch.unet.out, DotHead)
    _all_else_in_fp32(patch, {id(layer.weight) for layer in layers})


def _layers(models: tuple[nn.Module, ...]) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """The products: of the UNet all but the timestep's, of the VAE all but those from four channels to four."""
    for path, layer in [found for model in models for found in model.named_modules()]:
        if type(layer) is nn.Linear and "time_embed" not in path and "emb_layers" not in path:
            yield layer, DotLinear
        elif type(layer) is nn.Conv2d and "quant_conv" not in path:
            yield layer, DotConv


def _attention(patch: Patch, to_itself: CrossAttention, to_text: CrossAttention) -> None:
    for module in (to_itself, to_text):
        patch.set(module, "attend", dot_attention, label="C++ bf16")
    projections = to_itself.to_q, to_itself.to_k, to_itself.to_v
    patch.swap(to_itself, DotSelfAttention, packed=Packed(projections))
    patch.within(*projections)
    for layer in (to_text.to_q, to_text.to_k, to_text.to_v):
        patch.set(layer, "out", torch.bfloat16)


def _all_else_in_fp32(patch: Patch, packed: set[int]) -> None:
    """Parameters but those that are packed: norms, biases, the timestep's layers, the text encoder."""
    for model in (patch.clip, patch.unet, patch.vae):
        others = {
            name: weight
            for name, weight in model.named_parameters()
            if id(weight) not in packed and weight.dtype != torch.float32
        }
        if others:
            patch.converts(model, others, back=lambda model=model, others=others: assign(model, others))
            assign(model, {name: weight.detach().float() for name, weight in others.items()})
    patch.set(patch.pipe, "dtype", torch.float32)

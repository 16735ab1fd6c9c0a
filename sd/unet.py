"""The UNet: noisy latents, a timestep and a text context to the noise that was added.

Module names are those of the checkpoint under `model.diffusion_model`.
Axes: B batch, C channels, H W grid, L = H*W positions, S text tokens.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.attention import attention, merge_heads, split_heads
from sd.config import UNetConfig


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timesteps: t [B] -> [B, dim], cosines first, in fp32.

    The original code's order; "Attention Is All You Need" has the sines first.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbed(nn.Sequential):
    """Timesteps as sinusoids, and what two layers make of these."""

    def __init__(self, channels: int, emb_dim: int):
        super().__init__(nn.Linear(channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.channels = channels

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """t [B] or [], for the B pictures of x and in its dtype -> emb [B, emb_dim]."""
        return super().forward(timestep_embedding(t.expand(x.shape[0]), self.channels).to(x.dtype))


class CrossAttention(nn.Module):
    """Multi-head attention from x to context, or to x itself when context is None."""

    attend = staticmethod(attention)

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [B, L, C], context [B, S, context_dim] -> [B, L, C]."""
        return self.to_out(self.attended(x, context))

    def attended(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The same before the last projection: [B, L, C]."""
        context = x if context is None else context
        q = split_heads(self.to_q(x), self.heads)
        k = split_heads(self.to_k(context), self.heads)
        v = split_heads(self.to_v(context), self.heads)
        return merge_heads(self.attend(q, k, v))


class GEGLU(nn.Module):
    """value * gelu(gate), the gate being the second half of one projection (Shazeer 2020)."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        # The identity holds the place of the original's dropout, so that the last layer is called net.2.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, L, C], context [B, S, context_dim] -> [B, L, C]."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Every position of the grid attends to all positions, then to the text."""

    def __init__(self, channels: int, cfg: UNetConfig):
        super().__init__()
        # 1e-6 here and 1e-5 in the residual blocks: both are the original's.
        self.norm = nn.GroupNorm(cfg.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        heads = cfg.heads(channels)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, cfg.context_dim, heads) for _ in range(cfg.transformer_depth)
        )
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, C, H, W], context [B, S, context_dim] -> [B, C, H, W]."""
        h = self.proj_in(self.norm(x))
        height, width = h.shape[-2:]
        h = h.flatten(2).transpose(1, 2)  # [B, L, C]
        for block in self.transformer_blocks:
            h = block(h, context)
        h = h.transpose(1, 2).unflatten(2, (height, width))
        return x + self.proj_out(h)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a residual connection, with the timestep added between them."""

    def __init__(self, channels: int, out_channels: int, emb_dim: int, norm_groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(norm_groups, channels, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, out_channels))
        # The identity holds the place of the original's dropout, so that the convolution is called out_layers.3.
        self.out_layers = nn.Sequential(
            nn.GroupNorm(norm_groups, out_channels, eps=1e-5),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, C, H, W], emb [B, emb_dim] -> [B, out_channels, H, W]."""
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Sequential):
    """Layers in a row; residual blocks also get the timestep, transformers the text."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    def __init__(self, cfg: UNetConfig):
        super().__init__()
        emb_dim = 4 * cfg.model_channels
        self.time_embed = TimeEmbed(cfg.model_channels, emb_dim)
        self.input_blocks, skips = input_blocks(cfg, emb_dim)
        self.middle_block = middle_block(cfg, emb_dim, skips[-1])
        self.output_blocks = _output_blocks(cfg, emb_dim, skips)
        highest = cfg.model_channels * cfg.channel_mult[0]
        self.out = nn.Sequential(
            nn.GroupNorm(cfg.norm_groups, highest, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(highest, cfg.out_channels, 3, padding=1),
        )

    def forward(self, x: Tensor, t: Tensor, context: Tensor, *residuals: Tensor) -> Tensor:
        """Predict the noise in x.

        x [B, in_channels, H, W] with H and W divisible by the configuration's `downsampling`; t [B] or [], the
        timestep from 0 to 999; context [B, S, context_dim] -> eps [B, out_channels, H, W]. residuals: what ControlNets
        found (sd/controlnet.py), one for each of input_blocks and one for middle_block, of the shapes of their outputs.
        """
        emb = self.time_embed(t, x)
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        if residuals:
            x, skips = with_residuals(x, skips, residuals)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)


def with_residuals(x: Tensor, skips: Sequence[Tensor], residuals: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The middle block's output and the skips, each with its residual added; the middle's is the last."""
    return x + residuals[-1], [skip + more for skip, more in zip(skips, residuals[:-1], strict=True)]


def middle_block(cfg: UNetConfig, emb_dim: int, channels: int) -> Block:
    return Block(
        ResBlock(channels, channels, emb_dim, cfg.norm_groups),
        SpatialTransformer(channels, cfg),
        ResBlock(channels, channels, emb_dim, cfg.norm_groups),
    )


def input_blocks(cfg: UNetConfig, emb_dim: int) -> tuple[nn.ModuleList, list[int]]:
    """The way down, and the channels of every block's output: the skip connections."""
    blocks = [Block(nn.Conv2d(cfg.in_channels, cfg.model_channels, 3, padding=1))]
    skips = [cfg.model_channels]
    for level, mult in enumerate(cfg.channel_mult):
        if level > 0:
            blocks.append(Block(Downsample(skips[-1])))
            skips.append(skips[-1])
        channels = cfg.model_channels * mult
        for _ in range(cfg.num_res_blocks):
            layers = [ResBlock(skips[-1], channels, emb_dim, cfg.norm_groups)]
            if level in cfg.attention_levels:
                layers.append(SpatialTransformer(channels, cfg))
            blocks.append(Block(*layers))
            skips.append(channels)
    return nn.ModuleList(blocks), skips


def _output_blocks(cfg: UNetConfig, emb_dim: int, skips: list[int]) -> nn.ModuleList:
    """The way up: every block takes one skip connection, so each level has one block more than on the way down."""
    blocks, skips, previous = [], list(skips), skips[-1]
    for level, mult in reversed(list(enumerate(cfg.channel_mult))):
        channels = cfg.model_channels * mult
        for i in range(cfg.num_res_blocks + 1):
            layers: list[nn.Module] = [ResBlock(previous + skips.pop(), channels, emb_dim, cfg.norm_groups)]
            if level in cfg.attention_levels:
                layers.append(SpatialTransformer(channels, cfg))
            if level > 0 and i == cfg.num_res_blocks:
                layers.append(Upsample(channels))
            blocks.append(Block(*layers))
            previous = channels
    return nn.ModuleList(blocks)

"""The autoencoder: pictures to latents an eighth their size, and back.

Module names are those of the checkpoint under `first_stage_model`. Every GroupNorm here has eps 1e-6.
Axes: B batch, C channels, H W grid, L = H*W positions.
"""

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from sd.attention import attention
from sd.config import VAEConfig


def _norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = _norm(groups, channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = _norm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """One head as wide as the channels: 512 in SD 1.5, which no flash kernel takes."""

    attend = staticmethod(attention)

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = _norm(groups, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (proj(h).flatten(2).transpose(1, 2)[:, None] for proj in (self.q, self.k, self.v))  # [B, 1, L, C]
        h = self.attend(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only: padding on all sides shifts the latents


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Mid(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class DownLevel(nn.Module):
    def __init__(self, channels: int, out_channels: int, cfg: VAEConfig, last: bool):
        super().__init__()
        widths = [channels] + [out_channels] * cfg.num_res_blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, cfg.norm_groups) for a, b in itertools.pairwise(widths))
        self.downsample = nn.Identity() if last else Downsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.downsample(x)


class UpLevel(nn.Module):
    def __init__(self, channels: int, out_channels: int, cfg: VAEConfig, last: bool):
        super().__init__()
        widths = [channels] + [out_channels] * (cfg.num_res_blocks + 1)
        self.block = nn.ModuleList(ResnetBlock(a, b, cfg.norm_groups) for a, b in itertools.pairwise(widths))
        self.upsample = nn.Identity() if last else Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(x)


class Encoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths = [cfg.ch * mult for mult in (1, *cfg.ch_mult)]
        last = len(cfg.ch_mult) - 1
        self.conv_in = nn.Conv2d(cfg.in_channels, cfg.ch, 3, padding=1)
        self.down = nn.ModuleList(DownLevel(widths[i], widths[i + 1], cfg, i == last) for i in range(last + 1))
        self.mid = Mid(widths[-1], cfg.norm_groups)
        self.norm_out = _norm(cfg.norm_groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * cfg.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Levels are numbered as in the checkpoint: up.0 is the picture's own resolution and runs last."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths = [cfg.ch * mult for mult in cfg.ch_mult]
        inputs = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(cfg.z_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], cfg.norm_groups)
        self.up = nn.ModuleList(UpLevel(inputs[i], widths[i], cfg, i == 0) for i in range(len(widths)))
        self.norm_out = _norm(cfg.norm_groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], cfg.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.z_channels, 2 * cfg.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] in [-1, 1] -> mean and log-variance of the latents, [B, z, H/8, W/8] each.

        The latents that the UNet works on are `mean + exp(logvar / 2) * noise` times the configuration's scale_factor.
        """
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, z, H/8, W/8], already divided by scale_factor -> pictures [B, 3, H, W], about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))

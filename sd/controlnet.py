"""ControlNet (Zhang et al. 2023): a picture of edges, depth or a pose says what is where in the picture that is drawn.

It is a second way down beside the UNet's, which sees the hint too. What it finds at each level is added to the UNet's
skips, and at the lowest to the middle. Module names are those of the original checkpoints under `control_model`.
Axes: B batch, C channels, H W grid of the latents.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

from PIL import Image
from torch import Tensor, nn

from sd.config import UNetConfig
from sd.unet import TimeEmbed, input_blocks, middle_block

HINT_CHANNELS = (16, 16, 32, 32, 96, 96, 256)
HINT_PIXELS = 8
"""Of a hint, each way, that become one of the grid: three of its convolutions have a stride of 2."""


@dataclass(frozen=True)
class Control:
    """What `generate` is given: the name of a ControlNet (`StableDiffusion.add_control`), and a picture for it.

    picture: as the ControlNet was trained to see it, or for `control_preprocess` to make that of it; it is resized to
    what is drawn. weight: what it finds is multiplied by it. start, end: fractions of the steps between which it acts.
    """

    name: str
    picture: Image.Image
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0


class ControlNet(nn.Module):
    """The UNet's way down and middle, with a convolution of 1x1 after each block, which training starts at zero."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        cfg = replace(cfg, in_channels=cfg.out_channels)  # an inpainting model's, too, sees the latents alone
        self.in_channels = cfg.in_channels
        emb_dim = 4 * cfg.model_channels
        self.time_embed = TimeEmbed(cfg.model_channels, emb_dim)
        self.input_blocks, channels = input_blocks(cfg, emb_dim)
        self.zero_convs = nn.ModuleList(nn.Sequential(nn.Conv2d(c, c, 1)) for c in channels)
        self.input_hint_block = _hint_block(cfg.model_channels)
        self.middle_block = middle_block(cfg, emb_dim, channels[-1])
        self.middle_block_out = nn.Sequential(nn.Conv2d(channels[-1], channels[-1], 1))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> list[Tensor]:
        """What is added to each of the UNet's skips, then to its middle: [B, C, H, W], as `UNet.forward` takes it.

        x [B, 4 or more, H, W], of which the latents come first; t [B] or []; context [B, S, context_dim]; hint
        [B, model_channels, H, W], as `seen` makes it, once a picture.
        """
        emb = self.time_embed(t, x)
        x = x[:, : self.in_channels]
        found = []
        for i, (block, zero_conv) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            x = block(x, emb, context)
            if i == 0:
                x = x + hint
            found.append(zero_conv(x))
        return [*found, self.middle_block_out(self.middle_block(x, emb, context))]

    def seen(self, pixels: Tensor) -> Tensor:
        """A hint, [B, 3, 8 H, 8 W] in [0, 1], as the first block takes it: [B, model_channels, H, W]."""
        return self.input_hint_block(pixels)


def _hint_block(channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, HINT_CHANNELS[0], 3, padding=1), nn.SiLU()]
    for before, after in pairwise(HINT_CHANNELS):
        layers += [nn.Conv2d(before, after, 3, padding=1, stride=1 if before == after else 2), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(HINT_CHANNELS[-1], channels, 3, padding=1))

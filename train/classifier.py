"""A small network that names the concept in a picture: the judge of what the demo model draws.

It is trained on the real drawings alone, in random hues, sizes and places on random backgrounds, and never sees a
generated picture. Axes: N drawings, B batch, H W pixels.
"""

import logging
import math
import time
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

log = logging.getLogger(__name__)

LR = 3e-3
SIDE = 64  # pixels; pictures of other sizes are resized
# RGB to YIQ (NTSC): rotating the last two axes turns hues and leaves lightness alone.
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


class Block(nn.Module):
    """Residual block (He et al. 2016) that may halve the picture."""

    def __init__(self, channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.skip(x) + self.norm2(self.conv2(h)))


class Classifier(nn.Module):
    def __init__(self, classes: int, width: int = 32):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Conv2d(3, width, 7, stride=4, padding=3)  # small at once, so that a CPU trains it in minutes
        self.blocks = nn.Sequential(*(Block(a, b, stride=2) for a, b in pairwise(widths)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> scores [B, classes]."""
        if pictures.shape[-1] != SIDE:
            pictures = F.interpolate(pictures, (SIDE, SIDE), mode="area")
        return self.head(self.blocks(self.stem(pictures)).mean(dim=(2, 3)))


def random_pictures(rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Drawings, straight alpha, fp32 in [0, 1], [B, 4, H, W] -> [B, 3, H, W] in [-1, 1].

    Half keep their hues and a third have a white background, as what people ask for most.
    """
    batch, device = len(rgba), rgba.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, device=device)

    placed = _place(rgba, scale=0.75 + 0.3 * uniform(), shift=0.16 * (uniform(2) - 0.5))
    angle = 2 * math.pi * uniform() * (uniform() < 0.5)
    colours = _turn_hues(placed[:, :3], angle)
    background = torch.where(uniform(1) < 0.33, 1.0, uniform(3))[:, :, None, None]
    alpha = placed[:, 3:]
    return 2 * (colours * alpha + background * (1 - alpha)) - 1


def _place(rgba: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale [B] and shift [B, 2] (of half the picture's side) each drawing; outside it is clear."""
    affine = torch.zeros(len(rgba), 2, 3, device=rgba.device)
    affine[:, 0, 0] = affine[:, 1, 1] = 1 / scale
    affine[:, :, 2] = shift
    return F.grid_sample(rgba, F.affine_grid(affine, list(rgba.shape), align_corners=False), align_corners=False)


def _turn_hues(rgb: Tensor, angle: Tensor) -> Tensor:
    """Rotate the hues of pictures [B, 3, H, W] by angles [B], in radians."""
    rotation = torch.zeros(len(rgb), 3, 3, device=rgb.device)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 2, 1] = angle.sin()
    rotation[:, 1, 2] = -angle.sin()
    yiq = YIQ.to(rgb.device)
    matrix = torch.linalg.inv(yiq) @ rotation @ yiq
    return torch.einsum("bij,bjhw->bihw", matrix, rgb).clamp(0, 1)


def train_classifier(
    drawings: Tensor, labels: Tensor, seconds: float, device: torch.device, batch: int = 128, seed: int = 0
) -> Classifier:
    """Train for `seconds` on RGBA drawings, uint8 [N, 4, SIDE, SIDE], and their concepts, [N]."""
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    drawings, labels = drawings.to(device), labels.to(device)
    model = Classifier(int(labels.max()) + 1).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
    start, share = time.monotonic(), 0.0
    with tqdm(total=100, desc="classifier", unit="%", mininterval=5) as bar:
        while share < 1:
            for group in optimizer.param_groups:
                group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * share))
            rows = torch.randint(len(drawings), (batch,), generator=generator, device=device)
            pictures = random_pictures(drawings[rows].float() / 255, generator)
            pictures = pictures.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(pictures), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            share = (time.monotonic() - start) / seconds
            bar.update(min(100.0, 100 * share) - bar.n)
    log.info("classifier: last loss %.3f", loss.item())
    return model.eval()


@torch.inference_mode()
def rank(model: Classifier, pictures: Tensor, top: int = 5) -> Tensor:
    """The `top` likeliest concepts of pictures [B, 3, H, W] in [-1, 1], best first: [B, top]."""
    device = next(model.parameters()).device
    return torch.cat([model(part.to(device)).topk(top).indices.cpu() for part in pictures.split(256)])

"""The drawn pictures of the front pages, by the demo model: the loop, and what the VAE makes of latents."""

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bench.gallery import Tile, sheet
from bench.guide.pictures import PROMPT, SAMPLER, SEED, STEPS, webp
from sd.images import to_pil
from sd.pipeline import DEMO_CHECKPOINT, StableDiffusion
from sd.writing import write_whole

SHOWN = (1, 5, 10, 14, 18, 21, 25)


@torch.inference_mode()
def write(folder: Path) -> None:
    pipe = StableDiffusion.load(DEMO_CHECKPOINT, "cpu")
    kept: list[Tensor] = []
    pipe.generate(
        PROMPT, seed=SEED, steps=STEPS, sampler=SAMPLER, on_step=lambda step, steps, x: kept.append(x.clone())
    )
    write_whole(folder / "loop.webp", webp(sheet(list(_loop(pipe, kept)))))
    write_whole(folder / "vae.webp", webp(sheet(list(_vae(pipe, kept[-1])))))


def _loop(pipe: StableDiffusion, kept: list[Tensor]) -> Iterator[Tile]:
    """The latents of some steps, decoded: noise at first."""
    for step in SHOWN:
        yield f"step {step}", to_pil(pipe.decode(kept[step - 1]))[0]


def _vae(pipe: StableDiffusion, x: Tensor) -> Iterator[Tile]:
    """The four channels of the last latents in grey, and the picture."""
    picture = to_pil(pipe.decode(x))[0]
    for i, channel in enumerate(x[0]):
        grey = ((channel - channel.min()) / (channel.max() - channel.min()) * 255).byte().cpu().numpy()
        yield f"channel {i}", Image.fromarray(grey).convert("RGB").resize(picture.size, Image.Resampling.NEAREST)
    yield "decoded", picture

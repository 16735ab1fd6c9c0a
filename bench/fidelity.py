"""How far a picture is from the plain one: latents after each step, PSNR and SSIM.

Axes: N pictures, H W pixels, C colours.
"""

import math
import statistics
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.reference.numbers import psnr, relative_error
from sd.pipeline import StableDiffusion

# Sixteen things that the demo model and SD 1.5 both know.
PROMPTS = (
    "a red apple",
    "a blue car",
    "a yellow banana",
    "a green frog",
    "a house",
    "a cat",
    "a dog",
    "purple grapes",
    "a rocket",
    "a sunflower",
    "a pizza",
    "an owl",
    "a red heart",
    "a guitar",
    "a sailboat",
    "a blue circle left of a red square",
)


@dataclass(frozen=True)
class Drawing:
    """What a pipeline drew of some prompts: the latents after every step, and the pictures [N, H, W, C] in bytes."""

    latents: list[Tensor]
    pictures: np.ndarray


@dataclass(frozen=True)
class Fidelity:
    """The distance between two drawings.

    `errors` are ||x - reference|| / ||reference|| of the latents after each step, empty if the steps differ;
    `error_last` is that of the latents that were decoded. PSNR in decibels, SSIM: of the median picture and the worst.
    """

    pictures: int
    errors: list[float]
    error_first: float
    error_median: float
    error_last: float
    psnr_db: float
    psnr_db_worst: float
    ssim: float
    ssim_worst: float


def draw(
    pipe: StableDiffusion,
    steps: int,
    cfg_scale: float = 7.5,
    sampler: str = "ddpm",
    batch: int = 4,
    size: int | None = None,
    schedule: str | None = None,
) -> Drawing:
    """Draw PROMPTS with seeds 0, 1, ... in batches, at the model's own size if none is given.

    Everything is drawn twice: without a callback, as a person would, for the pictures and the last latents, and with
    one for the latents on the way. A pipeline that runs its whole loop in one graph may take another path for each.
    """
    options = {
        "steps": steps,
        "cfg_scale": cfg_scale,
        "sampler": sampler,
        "schedule": schedule,
        "height": size or None,
        "width": size or None,
    }
    batches = [range(i, min(i + batch, len(PROMPTS))) for i in range(0, len(PROMPTS), batch)]
    trajectories, finals, pictures = [], [], []
    for seeds in batches:
        prompts = [PROMPTS[i] for i in seeds]
        final, images = _draw_batch(pipe, prompts, list(seeds), options)
        finals.append(final)
        pictures += images
        on_the_way: list[Tensor] = []
        keep = lambda _step, _steps, x, out=on_the_way: out.append(x.float().cpu().clone())  # noqa: E731
        pipe.generate(prompts, seed=list(seeds), on_step=keep, **options)
        trajectories.append(on_the_way)
    latents = [torch.cat(step) for step in zip(*trajectories, strict=True)]
    return Drawing([*latents, torch.cat(finals)], np.stack(pictures))


def _draw_batch(
    pipe: StableDiffusion, prompts: list[str], seeds: list[int], options: dict
) -> tuple[Tensor, list[np.ndarray]]:
    """The final latents, taken where the pipeline hands them to the decoder, and the pictures."""
    finals: list[Tensor] = []
    decode = pipe.decode

    def keep(x: Tensor, *tile: int | None) -> Tensor:
        finals.append(x.float().cpu().clone())
        return decode(x, *tile)

    pipe.decode = keep
    try:
        images = pipe.generate(prompts, seed=seeds, **options)
    finally:
        pipe.decode = decode
    return finals[0], [np.asarray(image) for image in images]


def compare(drawing: Drawing, reference: Drawing) -> Fidelity:
    """Drawings of different step counts are compared by their last latents and pictures alone."""
    errors = []
    if len(drawing.latents) == len(reference.latents):
        errors = [relative_error(*pair) for pair in zip(drawing.latents, reference.latents, strict=True)][:-1]
    pairs = list(zip(drawing.pictures, reference.pictures, strict=True))
    psnrs = [psnr(*pair) for pair in pairs]
    ssims = [ssim(*pair) for pair in pairs]
    return Fidelity(
        pictures=len(pairs),
        errors=errors,
        error_first=errors[0] if errors else math.nan,
        error_median=statistics.median(errors) if errors else math.nan,
        error_last=relative_error(drawing.latents[-1], reference.latents[-1]),
        psnr_db=statistics.median(psnrs),
        psnr_db_worst=min(psnrs),
        ssim=statistics.median(ssims),
        ssim_worst=min(ssims),
    )


def ssim(picture: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity of two byte pictures [H, W, C], 1 if they are equal (Wang et al. 2004).

    The paper's window, a Gaussian of sigma 1.5 over 11 x 11 pixels, within the picture, the colours averaged.
    """
    x, y = (torch.from_numpy(p.astype(np.float64)).permute(2, 0, 1)[:, None] for p in (picture, reference))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean().item()


def _blur(x: Tensor) -> Tensor:
    """Gaussian blur of [C, 1, H, W] -> [C, 1, H - 10, W - 10]."""
    positions = torch.arange(-5, 6, dtype=x.dtype)
    kernel = torch.exp(-(positions**2) / (2 * 1.5**2))
    kernel = kernel / kernel.sum()
    return F.conv2d(F.conv2d(x, kernel[None, None, :, None]), kernel[None, None, None, :])

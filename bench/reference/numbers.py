"""Seeded noise, and how far two results are apart."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian noise from a generator of its own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in double precision; NaN passes through. The shapes must be the same."""
    assert actual.shape == expected.shape, f"{list(actual.shape)} beside {list(expected.shape)}"
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return ((actual - expected).norm() / expected.norm()).item()


def pixels(images: Image.Image | str | Path | Iterable[Image.Image]) -> np.ndarray:
    """Bytes as integers, whose differences do not wrap: [H, W, 3] of a picture or its file, [B, H, W, 3] of several."""
    if isinstance(images, str | Path):
        with Image.open(images) as image:
            return pixels(image)
    if isinstance(images, Image.Image):
        return np.asarray(images).astype(int)
    return np.stack([pixels(image) for image in images])


def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two arrays of bytes; infinity if they are the same."""
    error = np.mean((picture.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))

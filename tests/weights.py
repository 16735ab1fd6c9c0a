"""Random models for tests: each kind is drawn once in a process, and every call gives copies."""

import functools
import io
import pickle
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.reference import weights
from bench.reference.weights import Models, tiny_config
from sd.config import Config
from sd.pipeline import StableDiffusion

SHALLOW = tiny_config(
    unet={"channel_mult": (1, 2), "attention_levels": (0,)}, vae={"ch_mult": (1, 2)}, image_size=16, name="shallow"
)
"""Two levels instead of four, one with attention and one without: it draws 16x16 pixels in a third of TINY's time."""


class _Pickler(pickle.Pickler):
    """Puts the parameters aside, in the order in which they are met."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.parameters: list[Tensor] = []

    def persistent_id(self, found: Any) -> int | None:
        if not isinstance(found, nn.Parameter):
            return None
        self.parameters.append(found.detach().clone())
        return len(self.parameters) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, parameters: list[Tensor]) -> None:
        super().__init__(file)
        self.parameters = parameters

    def persistent_load(self, index: int) -> nn.Parameter:
        return nn.Parameter(self.parameters[index].clone(), requires_grad=False)


class Copier:
    """Calls give copies of the models as they are now, several times as fast as copy.deepcopy does."""

    def __init__(self, models: Models) -> None:
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(models)
        self.modules, self.parameters = file.getvalue(), pickler.parameters

    def __call__(self) -> Models:
        return _Unpickler(io.BytesIO(self.modules), self.parameters).load()


@functools.lru_cache(maxsize=8)
def copier(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> Copier:
    return Copier(weights.random_models(config, seed, dtype))


def random_models(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> Models:
    """bench.reference.weights.random_models's, without drawing them anew."""
    return copier(config, seed, dtype)()


def tiny_pipeline(dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> StableDiffusion:
    """bench.reference.weights.tiny_pipeline's, without drawing its weights anew."""
    config = tiny_config(**changes)
    return StableDiffusion(config, *random_models(config, seed, dtype))


def shallow_pipeline(dtype: torch.dtype = torch.float32, seed: int = 0, **unet) -> StableDiffusion:
    """SHALLOW's, with changes of its UNet."""
    config = replace(SHALLOW, unet=replace(SHALLOW.unet, **unet))
    return StableDiffusion(config, *random_models(config, seed, dtype))

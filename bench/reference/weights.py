"""Random weights in the original layout: checkpoints for tests and benchmarks, of any size."""

import contextlib
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sd.checkpoints.layouts import PREFIXES, ema_name
from sd.clip import CLIP
from sd.config import Config, TextConfig, UNetConfig, VAEConfig
from sd.controlnet import ControlNet
from sd.models import build
from sd.pipeline import StableDiffusion
from sd.unet import UNet
from sd.vae import VAE

Models = tuple[CLIP, UNet, VAE]

TINY = Config(
    text=TextConfig(width=64, layers=2, heads=1),
    unet=UNetConfig(model_channels=32, context_dim=64, num_res_blocks=1),
    vae=VAEConfig(ch=32, num_res_blocks=1),
    image_size=64,
    name="tiny",
)
"""All levels of SD 1.5 with 4.9 M parameters, 3.2 M of them the token table. What shapes cannot tell is SD 1's but for
image_size and name, so that the models survive a file without a configuration."""


TINY_SD2 = Config(
    text=TextConfig(width=64, layers=2, heads=1, openclip=True),
    unet=UNetConfig(
        model_channels=64,
        channel_mult=(1, 2),
        attention_levels=(0, 1),
        context_dim=64,
        num_res_blocks=1,
        head_channels=64,
        linear_projections=True,
    ),
    vae=VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1),
    image_size=16,
    name="tiny SD 2",
)
"""Two levels of SD 2, with one head at the first and two at the second."""

SD21 = Config(
    text=TextConfig(width=1024, layers=23, heads=16, openclip=True),
    unet=UNetConfig(context_dim=1024, head_channels=64, linear_projections=True),
    image_size=768,
    name="Stable Diffusion 2",
    prediction="v",
)
"""Stable Diffusion 2.1 (v2-1_768-ema-pruned): of OpenCLIP's 24 layers those that are used."""


def tiny_config(**changes) -> Config:
    """TINY with changes: `tiny_config(unet={"norm_groups": 8}, image_size=128)`."""
    parts = {part: replace(getattr(TINY, part), **changes.pop(part, {})) for part in ("text", "unet", "vae")}
    return replace(TINY, **parts, **changes)


def random_models(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> Models:
    """Models whose activations stay near 1 and whose outputs depend on every weight; eval mode, no gradients.

    One seed gives the same numbers in any dtype, up to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    models = build(config)
    for model in models:
        state = {name: _random(name, t.shape, generator).to(dtype) for name, t in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        model.eval().requires_grad_(False)
    return models


def random_controlnet(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> ControlNet:
    """A ControlNet beside such a UNet, whose zero convolutions are not zero, and to which the hint is as loud as x."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        net = ControlNet(config.unet)
    state = {name: _random(name, t.shape, generator).to(dtype) for name, t in net.state_dict().items()}
    for weight in (t for name, t in state.items() if name.startswith("input_hint_block.") and t.ndim > 1):
        weight.mul_(1.7)  # between them SiLU takes more than half of the variance
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)


def tiny_pipeline(dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> StableDiffusion:
    """A pipeline of random weights on the CPU: `tiny_config(**changes)`'s."""
    config = tiny_config(**changes)
    return StableDiffusion(config, *random_models(config, seed, dtype))


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Matrices and kernels keep the variance of their input; norms scale by about 1; biases are small, not zero."""
    values = torch.empty(shape).normal_(generator=generator)
    if name.endswith("bias"):
        return values.mul_(0.1)
    if len(shape) == 1:
        return values.mul_(0.1).add_(1)
    return values.mul_(0.5) if "embedding" in name else values.mul_(shape[1:].numel() ** -0.5)


def original_layout(models: Models, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The models' tensors by their names in a checkpoint."""
    return {
        PREFIXES[part] + name: tensor.detach().to(dtype or tensor.dtype)
        for part, model in zip(PREFIXES, models, strict=True)
        for name, tensor in model.state_dict().items()
    }


def ema_layout(unet: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A UNet's tensors under the names of averaged weights, and the averaging's own state."""
    tensors = {ema_name(name): tensor.detach().to(dtype or tensor.dtype) for name, tensor in unet.state_dict().items()}
    return {**tensors, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def schedule_buffers() -> dict[str, Tensor]:
    """What the original code keeps beside the weights."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = (1 - betas).cumprod(0)
    return {
        "betas": betas.float(),
        "alphas_cumprod": alphas_cumprod.float(),
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt().float(),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }


def write_safetensors(path: Path, models: Models, dtype: torch.dtype | None = None, **extra: Tensor) -> None:
    """Write the models, and extra tensors by name, without metadata."""
    save_file({k: v.contiguous() for k, v in {**original_layout(models, dtype), **extra}.items()}, path)


def write_ckpt(
    path: Path,
    models: Models,
    lightning: bool = True,
    ema: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    legacy: bool = False,
) -> None:
    """Write a pickle as training leaves it: the weights under `state_dict` beside schedules and training state.

    lightning: include objects of pytorch_lightning's classes and numpy scalars, which is not installed to read them.
    ema: a UNet to include as the averaged weights.
    legacy: the format of torch before 1.6, which is not a zip file.
    """
    tensors = {**schedule_buffers(), **original_layout(models, dtype), **(ema_layout(ema, dtype) if ema else {})}
    content = {"epoch": 0, "global_step": 7, "state_dict": tensors}
    with stand_in_lightning() if lightning else contextlib.nullcontext() as training_state:
        torch.save({**content, **(training_state or {})}, path, _use_new_zipfile_serialization=not legacy)


@contextlib.contextmanager
def stand_in_lightning() -> Iterator[dict]:
    """Fabricate the modules of pytorch_lightning that a checkpoint refers to, while it is pickled.

    Yields training state: a class as a key, an object as a key, an object with state, a dict subclass, numpy scalars.
    """
    callbacks, parsing = "pytorch_lightning.callbacks.model_checkpoint", "pytorch_lightning.utilities.parsing"
    made = {}
    for path in (callbacks, parsing):
        parts = path.split(".")
        made |= {name: types.ModuleType(name) for name in (".".join(parts[: i + 1]) for i in range(len(parts)))}
    checkpoint = type("ModelCheckpoint", (), {"__module__": callbacks})
    attributes = type("AttributeDict", (dict,), {"__module__": parsing})
    made[callbacks].ModelCheckpoint, made[parsing].AttributeDict = checkpoint, attributes
    callback = checkpoint()
    callback.monitor, callback.best = "val/loss", np.float64(0.25)
    hyper = attributes(learning_rate=1e-4, betas=[0.9, 0.999])
    state = {"callbacks": {checkpoint: {"best": np.float32(0.5)}, callback: 1}, "hyper_parameters": hyper}
    sys.modules.update(made)
    try:
        yield state
    finally:
        for name in made:
            sys.modules.pop(name, None)

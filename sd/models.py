"""The three models of a configuration, without weights."""

import torch
from torch.overrides import TorchFunctionMode

from sd.clip import CLIP
from sd.config import Config
from sd.unet import UNet
from sd.vae import VAE


def build(config: Config) -> tuple[CLIP, UNet, VAE]:
    """The three models on the meta device: shapes without memory."""
    with torch.device("meta"), _NoInitialization():
        return CLIP(config.text), UNet(config.unet), VAE(config.vae)


class _NoInitialization(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device it draws nothing, but nn.Embedding's imports torch._dynamo, 2 s."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))

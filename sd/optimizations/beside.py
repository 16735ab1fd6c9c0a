"""Networks beside the UNet: what a switch does to the UNet, it does to each ControlNet.

Its function runs again, with a patch in which the ControlNet stands in the UNet's place; of text encoder and VAE there
is nothing, and of the pipeline's seams `predict` alone. A registration's `beside` is for those that do something else
there. What was done is not taken back step by step: a ControlNet is a file's, and is read again.
"""

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sd.controlnet import ControlNet
from sd.optimizations.base import Patch, Record

if TYPE_CHECKING:
    from sd.pipeline import StableDiffusion

log = logging.getLogger(__name__)


class Beside(Record):
    """All that was done to one ControlNet."""

    def __init__(self, pipe: "StableDiffusion", network: ControlNet):
        super().__init__(pipe)
        self.clip, self.unet, self.vae = nn.Module(), network, nn.Module()

    def parts(self) -> dict[str, nn.Module]:
        return {"control": self.unet}

    def new_patch(self, name: str) -> "BesidePatch":
        return BesidePatch(self, name)


class BesidePatch(Patch):
    """What a switch may do to a ControlNet. What it does to the pipeline is done already, by its first patch."""

    @property
    def share(self) -> float:
        return _size(self.unet) / _size(self.pipe.unet)

    def twin(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        config = self.pipe.config.unet
        _, (x, *others) = super().twin()
        with torch.device("meta"):
            hint = torch.empty(x.shape[0], config.model_channels, *x.shape[2:])
            return ControlNet(config), (x, *others, hint)

    def set(self, owner: Any, name: str, value: Any, label: str = "") -> None:
        if owner is not self.pipe:
            super().set(owner, name, value, label)

    def around(self, place: Any, wrapper: Any) -> None:
        if place == "predict" or isinstance(place, nn.Module):
            super().around(place, wrapper)

    def _are_the_files(self, part: str, names: Collection[str]) -> bool:
        return True


def reach(record: Record, network: ControlNet) -> None:
    """Do to a plain ControlNet what was done to the UNet, in the same order."""
    beside = Beside(record.pipe, network)
    with torch.inference_mode(False), torch.no_grad():
        for patch in record.patches:
            if callable(patch.again):
                patch.again(beside.patch(patch.name))
            elif patch.again:
                log.info("%s leaves a ControlNet as it is: %s", patch.name, patch.again)
    network.record = beside


def _size(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())

"""LoRAs merged into a pipeline's weights, and taken out again to the bit.

A merged weight is written in place, so that what was derived from it follows: packed and Winograd kernels are made
again, captured and compiled calls read it where it was. It is computed from the checkpoint's weight whenever a strength
changes: nothing adds up. That weight is read from the checkpoint's file; where no file has it, it is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sd import model_loader
from sd.checkpoints.errors import some
from sd.checkpoints.lora import Adapter, Layer, read_lora
from sd.nearest import there_are

if TYPE_CHECKING:
    from sd.pipeline import StableDiffusion

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """A file's changes at a strength, 0 for none of it."""

    path: Path
    adapter: Adapter
    strength: float


class Loras:
    """Those of one pipeline, in the order in which they were added, by name. It is passed to each call."""

    def __init__(self) -> None:
        self.merged: dict[str, Merged] = {}
        self._kept: dict[Layer, Tensor] = {}  # weights that no file has
        self._from_file: set[Layer] = set()

    def add(self, pipe: StableDiffusion, path: str | Path, strength: float) -> str:
        """Merge a file; returns the name by which `set` and `remove` know it: the file's, without its ending.

        Raises CheckpointError, with nothing changed, for a file that fits nothing here, and ValueError where weights
        are quantized or a file of that name is there already.
        """
        _check_weights(pipe)
        name, path = Path(path).stem, Path(path)
        if name in self.merged:
            raise ValueError(f"a LoRA called {name} is merged already: set_lora changes its strength")
        adapter = read_lora(path, pipe.unet, pipe.clip)
        if adapter.unknown:
            told = len(adapter.changes), some(adapter.unknown, 8)
            log.warning("%s changes %d layers; left out, since they fit nothing: %s", path.name, *told)
        if words := adapter.triggers():
            log.info("%s was trained with: %s", path.name, ", ".join(words))
        if adapter.words:
            pipe.words.learn(dict(adapter.words), path)
        self.merged[name] = Merged(path, adapter, strength)
        self._merge(pipe, adapter.changes)
        return name

    def set(self, pipe: StableDiffusion, name: str, strength: float) -> None:
        """Another strength for one that is merged. Raises ValueError for a name that is not."""
        _check_weights(pipe)
        before = self._named(name)
        self.merged[name] = Merged(before.path, before.adapter, strength)
        self._merge(pipe, before.adapter.changes)

    def remove(self, pipe: StableDiffusion, name: str | None = None) -> None:
        """Take one out, or all: where none is left in a layer, its weight is the checkpoint's again, bit for bit."""
        _check_weights(pipe)
        gone = [self._named(name)] if name else list(self.merged.values())
        self.merged = {key: one for key, one in self.merged.items() if one not in gone}
        pipe.words.forget(word for one in gone for word in one.adapter.words if word in pipe.words.words)
        layers = {layer: None for one in gone for layer in one.adapter.changes}
        self._merge(pipe, layers)
        self._forget(layers.keys() - {layer for one in self.merged.values() for layer in one.adapter.changes})

    def again(self, pipe: StableDiffusion, read: Collection[str]) -> None:
        """Merge anew where weights, as `unet.out.2.weight`, were read from the file: those are the originals now."""
        layers = {layer: None for one in self.merged.values() for layer in one.adapter.changes if _name(layer) in read}
        self._forget(layers)
        self._merge(pipe, layers)

    def _forget(self, layers: Iterable[Layer]) -> None:
        for layer in layers:
            self._kept.pop(layer, None)
            self._from_file.discard(layer)

    def _named(self, name: str) -> Merged:
        if name not in self.merged:
            raise ValueError(f"no LoRA {name!r} is merged{there_are(name, self.merged)}")
        return self.merged[name]

    def _merge(self, pipe: StableDiffusion, layers: Iterable[Layer]) -> None:
        """Write these layers' weights: the checkpoint's, with all that is merged."""
        originals = self._originals(pipe, list(layers))
        with torch.inference_mode(False), torch.no_grad():
            for layer, value in originals.items():
                for one in self.merged.values():
                    if layer in one.adapter.changes and one.strength:
                        value = one.adapter.changes[layer].applied(value.float(), one.strength)
                _weight(pipe, layer).copy_(value)
        # Whoever undoes something reads the file again, and then calls `again`.
        pipe.note_loaded([_name(layer) for layer in originals if layer in self._from_file])

    def _originals(self, pipe: StableDiffusion, layers: list[Layer]) -> dict[Layer, Tensor]:
        """The weights without any LoRA: from the file, or as they were when they were first changed."""
        as_loaded = pipe.loaded_names() if pipe.source is not None else set()
        for layer in layers:
            if layer not in self._kept and layer not in self._from_file:
                if _name(layer) in as_loaded:
                    self._from_file.add(layer)
                else:
                    self._kept[layer] = _weight(pipe, layer).detach().clone()
        found = {layer: self._kept[layer] for layer in layers if layer in self._kept}
        for part in ("unet", "clip"):
            names = [f"{path}.weight" for p, path in layers if p == part and (p, path) in self._from_file]
            if names:
                read = model_loader.read_weights(pipe.source, pipe.config, part, names, pipe.device)
                found |= {(part, name.removesuffix(".weight")): tensor for name, tensor in read.items()}
        return found


def _name(layer: Layer) -> str:
    return ".".join((*layer, "weight"))


def _weight(pipe: StableDiffusion, layer: Layer) -> Tensor:
    part, path = layer
    return getattr(pipe, part).get_submodule(path).weight


def _check_weights(pipe: StableDiffusion) -> None:
    if done := getattr(pipe.unet, "quantization", None):
        order = "undo the optimizations, change LoRAs, apply again"
        raise ValueError(f"the UNet is quantized by {done.switch}: {order}")

"""The ControlNets of a pipeline, and what they are shown."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from sd import model_loader
from sd.controlnet import HINT_PIXELS, Control, ControlNet
from sd.edits import Edit
from sd.guidance import Residuals
from sd.hints import one_each, preprocessed
from sd.images import from_pil, resized, to_rgb
from sd.nearest import there_are

if TYPE_CHECKING:
    from sd.pipeline import StableDiffusion


class ControlNets:
    """Those of one pipeline, by name. It is passed to each call.

    They lie beside the UNet, in the pipeline's dtype. Where dtype or device have changed, a ControlNet is read again.
    files: of all of them. loaded: those that are in memory. prepare: what is done to each after it is read; so
    optimizations reach them.
    """

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}
        self.loaded: dict[str, ControlNet] = {}
        self._sources: dict[Path, model_loader.Source] = {}
        self.prepare: Callable[[ControlNet], None] | None = None

    def add(self, pipe: StableDiffusion, path: str | Path) -> str:
        """Load a file; returns its name: the file's without its ending, with a number where another has that."""
        path = Path(path).absolute()
        if path in self.files.values():
            return next(name for name, file in self.files.items() if file == path)
        taken = [path.stem, *(f"{path.stem}-{i}" for i in range(2, len(self.files) + 2))]
        name = next(name for name in taken if name not in self.files)
        self.loaded[name], self.files[name] = self._load(pipe, path), path
        return name

    def remove(self, name: str | None = None) -> None:
        """Forget one, or all. Raises ValueError for a name that there is not."""
        for one in list(self.files) if name is None else [self._known(name)]:
            del self.files[one]
            self.loaded.pop(one, None)

    def prepare_with(self, pipe: StableDiffusion, prepare: Callable[[ControlNet], None]) -> None:
        """Do this to each, and to those that come. They must be as their files have them."""
        for net in [self._ready(pipe, name) for name in self.files]:
            prepare(net)
        self.prepare = prepare

    def as_in_files(self) -> None:
        """Let all go that was done to them: each is read again when it is needed."""
        self.prepare = None
        self.loaded.clear()

    def residuals(
        self,
        pipe: StableDiffusion,
        controls: Sequence[Control],
        preprocess: Sequence[str] | str | None,
        edits: Sequence[Edit],
        grid: tuple[int, int],
    ) -> tuple[Residuals, ...]:
        """What the denoiser is told of the controls, for latents of this height and width."""
        found = []
        for control, how in zip(controls, one_each(preprocess, len(controls)), strict=True):
            self._check_unwritten(control.name)
            net = self._ready(pipe, control.name)
            pixels = _hint(control.picture, how, edits, HINT_PIXELS * grid[0], HINT_PIXELS * grid[1])
            hint = net.seen(pixels.to(pipe.device, pipe.dtype))
            found.append(Residuals(net, hint, control.weight, control.start, control.end))
        return tuple(found)

    def check(self, controls: Sequence[Control], preprocess: Sequence[str] | str | None) -> None:
        """Raise ValueError for a ControlNet that was not added, and for numbers out of range."""
        for control in controls:
            if not isinstance(control, Control):
                raise ValueError(f"control must be a list of Control, not of {type(control).__name__}")
            self._known(control.name)
            check_numbers(control.weight, control.start, control.end)
        if controls:
            one_each(preprocess, len(controls))

    def _known(self, name: str) -> str:
        if name not in self.files:
            raise ValueError(f"no ControlNet {name!r} was added{there_are(name, self.files)}")
        return name

    def _check_unwritten(self, name: str) -> None:
        """Raise CheckpointError if the file that one in memory is mapped from was written to."""
        if name in self.loaded:
            self._sources[self.files[name]].check_unwritten()

    def _ready(self, pipe: StableDiffusion, name: str) -> ControlNet:
        weight = next(self.loaded[name].parameters()) if name in self.loaded else None
        if weight is None or (weight.dtype, weight.device) != (pipe.dtype, next(pipe.vae.parameters()).device):
            self.loaded[name] = self._load(pipe, self.files[name])
        return self.loaded[name]

    def _load(self, pipe: StableDiffusion, path: Path) -> ControlNet:
        with torch.inference_mode(False):
            own = lambda names: _own_weights(pipe, names)  # noqa: E731
            net = model_loader.load_controlnet(path, pipe.config.unet, own, pipe.device, pipe.dtype)
        self._sources[path] = model_loader.Source.of(path, False, pipe.dtype)
        if self.prepare:
            self.prepare(net)
        return net


def check_numbers(weight: float, start: float, end: float) -> None:
    """Raise ValueError for a weight that is no number, and for no part of the steps."""
    if not -1000 <= weight <= 1000:
        raise ValueError(f"a control's weight must be from -1000 to 1000, not {weight}")
    if not 0 <= start < end <= 1:
        raise ValueError(f"a control acts between two fractions of the steps, as 0-0.5, not {start}-{end}")


def _own_weights(pipe: StableDiffusion, names: Collection[str]) -> dict[str, Tensor]:
    """The checkpoint's, whatever LoRAs and optimizations have made of them; of a pipeline from no file, the UNet's."""
    if pipe.source is not None:
        return model_loader.read_weights(pipe.source, pipe.config, "unet", names, pipe.device)
    if getattr(pipe.unet, "quantization", None):
        raise ValueError("the UNet is quantized: add what is a difference to its weights before that")
    weights = pipe.unet.state_dict()
    return {name: weights[name] for name in names}


def _hint(picture: Image.Image, how: str, edits: Sequence[Edit], height: int, width: int) -> Tensor:
    """[1, 3, height, width] in [0, 1]; one for each edit where they draw regions of their own."""
    picture = to_rgb(picture)
    parts = [_part(picture, one) for one in edits if one.region] or [picture]
    shown = [preprocessed(resized(part, height, width), how) for part in parts]
    return torch.cat([from_pil(one, height, width) for one in shown]) / 2 + 0.5


def _part(picture: Image.Image, one: Edit) -> Image.Image:
    return resized(picture, one.image.height, one.image.width).crop(one.region)

"""Read and write checkpoints in the original layout of Stable Diffusion 1.x, without running what is in them.

A checkpoint is a .safetensors file, a .ckpt pickle, or the index of a split .safetensors; which one is decided by
the file's first bytes. Weights are memory-mapped: parameters of the file's own type on the CPU are the file, and others
are converted tensor by tensor. Module names are the checkpoint's names after three prefixes, so loading is strict.
"""

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sd.checkpoints.controlnet import DIFFERENCE, names_in
from sd.checkpoints.errors import CheckpointError, StrPath, damaged, naming, some
from sd.checkpoints.files import Opened, check_size, files_of, written
from sd.checkpoints.layouts import PREFIXES, TOKEN_IDS, TOKEN_TABLE, ema_name, unusual
from sd.checkpoints.mapped import drop_pages, mapped_files
from sd.checkpoints.saving import save
from sd.checkpoints.shapes import config_of, is_guess
from sd.checkpoints.vae_files import open_vae, vae_file
from sd.checkpoints.whole import open_controlnet, open_model
from sd.clip import CLIP
from sd.config import Config, UNetConfig
from sd.controlnet import ControlNet
from sd.models import build
from sd.unet import UNet
from sd.vae import VAE

__all__ = ["CheckpointError", "Source", "load", "load_controlnet", "read_state_dict", "read_weights", "save"]

log = logging.getLogger(__name__)

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *_FP8)
_SCALES = (".scale_weight", ".weight_scale", ".scale_input")
_LARGEST_TABLE = 1 << 30  # bytes that a compact token table may expand to; SD 1.5's in fp32 is 0.15 GB

Wanted = dict[str, tuple[str, torch.Size]]
"""For each tensor of a module: its name in the file and its shape."""


@dataclass(frozen=True)
class Source:
    """Where a pipeline's weights came from: what `load` was given, and when its files were written."""

    path: Path
    ema: bool
    dtype: torch.dtype
    written: tuple[int, ...]
    vae: Path | None = None

    @classmethod
    def of(cls, path: StrPath, ema: bool, dtype: torch.dtype, vae: StrPath | None = None) -> "Source":
        """Of files that are there. Paths are made absolute, but links stay: an index names files beside itself."""
        path, vae = Path(path).absolute(), vae and Path(vae).absolute()
        return cls(path, ema, dtype, _written(path, vae), vae)

    def check_unwritten(self) -> None:
        """Raises CheckpointError if a file was written to that is still mapped: its weights are others now.

        Files that are replaced or removed as a whole stay as they were for who has them mapped.
        """
        try:
            if _written(self.path, self.vae) == self.written:
                return
            inodes = {file.stat().st_ino for path in (self.path, self.vae) if path for file in files_of(path)}
        except OSError:
            return
        if any(file.inode in inodes for file in mapped_files()):
            raise CheckpointError(f"{self.path}: was written to while it was in use; load it again")


def _written(path: Path, vae: Path | None) -> tuple[int, ...]:
    return written(path) + (written(vae_file(vae)) if vae else ())


def load(
    path: StrPath,
    *,
    ema: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    prediction: str | None = None,
    vae: StrPath | None = None,
) -> tuple[Config, CLIP, UNet, VAE]:
    """Build the models that a checkpoint, or a folder of diffusers', describes and fill them.

    They are in eval mode, without gradients.

    ema: take the UNet from the averaged weights `model_ema.*` that training checkpoints carry beside the others.
    dtype: with the file's own type on the CPU, the parameters are the mapped file (copy on write: changing one does not
        change the file). Otherwise each tensor is converted by itself and its pages of the file are let go.
    prediction: "eps" or "v", in place of what the file says, or a guess.
    vae: a file or folder to take the autoencoder from, in place of the checkpoint's.

    Raises CheckpointError if the file is not a whole Stable Diffusion 1.x or 2.x checkpoint of finite numbers.
    """
    config, states = read(path, ema=ema, device=device, dtype=dtype, prediction=prediction, vae=vae)
    models = build(config)
    for model, state in zip(models, states.values(), strict=True):
        model.load_state_dict(state, strict=True, assign=True)
        model.eval().requires_grad_(False)
    return config, *models


def read(
    path: StrPath,
    *,
    ema: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    prediction: str | None = None,
    vae: StrPath | None = None,
) -> tuple[Config, dict[str, dict[str, Tensor]]]:
    """The tensors of "clip", "unet" and "vae", checked, as `load` puts them into models.

    dtype None: as they are stored, but fp8 as fp16.
    """
    with naming(path):
        opened = open_model(Path(path))
        config = config_of(opened, prediction)
        if not prediction and is_guess(opened):
            told = "the file does not say what its UNet predicts; it looks like %s: --prediction eps or v decides"
            log.warning(told, config.prediction)
        models = dict(zip(PREFIXES, _build_checked(config), strict=True))
        others = {"vae": vae} if vae else {}
        states = _states({part: m for part, m in models.items() if part not in others}, opened, ema, device, dtype)
    if vae:
        with naming(vae):
            own = open_vae(Path(vae), models["vae"], config.vae.scale_factor)
            wanted = _wanted("vae", models["vae"], ema=False)
            _check(own, wanted.values())
            states["vae"] = _state(own, wanted, torch.device(device), dtype)
    return config, states


@dataclass(frozen=True)
class Stored:
    """What a checkpoint's UNet is stored as: in which type, and how many numbers."""

    dtype: torch.dtype
    numbers: int


def stored(path: StrPath) -> Stored:
    """Looks at the file without loading it. Raises CheckpointError as `load` does, but not for what it holds."""
    with naming(path):
        tensors = open_model(Path(path)).tensors
        unet = [tensor for name, tensor in tensors.items() if name.startswith(PREFIXES["unet"])]
        if not unet:
            raise CheckpointError("holds no UNet")
    largest = max(unet, key=torch.Tensor.numel)
    return Stored(largest.dtype, sum(tensor.numel() for tensor in unet))


def read_state_dict(path: StrPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a checkpoint by name, memory-mapped where the format allows it, and its metadata.

    Names are the original layout's, also in files that leave out `text_model.`. Raises CheckpointError.
    """
    with naming(path):
        opened = open_model(Path(path))
    return opened.tensors, opened.metadata


def read_weights(
    source: Source, config: Config, part: str, names: Collection[str], device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Tensors of one model, "clip", "unet" or "vae", bit for bit as `load` put them there, mapped where they were.

    config: that of the models, which gives the shapes. names: as in the model's state_dict, `out.2.weight`.

    Raises CheckpointError as `load` does, and if the file has changed since.
    """
    separate = source.vae if part == "vae" else None
    with naming(separate or source.path):
        model = dict(zip(PREFIXES, _build_checked(config), strict=True))[part]
        opened = open_vae(separate, model, config.vae.scale_factor) if separate else open_model(source.path)
        if _written(source.path, source.vae) != source.written:
            raise CheckpointError("has changed since it was loaded; load it again")
        every = _wanted(part, model, source.ema)
        wanted = {name: every[name] for name in names}
        _check(opened, wanted.values())
        return _state(opened, wanted, torch.device(device), source.dtype)


def load_controlnet(
    path: StrPath,
    config: UNetConfig,
    unet_weights: Callable[[Collection[str]], dict[str, Tensor]],
    device: str | torch.device,
    dtype: torch.dtype,
) -> ControlNet:
    """A ControlNet beside a UNet of this configuration, in eval mode; what is left over in the file is logged.

    unet_weights(names): the UNet's own, to which a file that holds differences is added.

    Raises CheckpointError if the file is none for this UNet, or holds other than finite numbers.
    """
    with naming(path):
        opened = open_controlnet(Path(path))
        with torch.device("meta"):
            net = ControlNet(config)
        names = names_in(opened.tensors, net)
        wanted = {name: (names[name], tensor.shape) for name, tensor in net.state_dict().items()}
        _check(opened, wanted.values())
        differs = DIFFERENCE in opened.tensors
        state = _state(opened, wanted, torch.device(device), torch.float32 if differs else dtype)
        if left := sorted(opened.tensors.keys() - set(names.values()) - {DIFFERENCE}):
            log.warning("%s: left out, since they are no part of a ControlNet: %s", Path(path).name, some(left, 8))
    if differs:
        state = {name: tensor.to(dtype) for name, tensor in _added(state, net, unet_weights).items()}
    net.load_state_dict(state, strict=True, assign=True)
    return net.eval().requires_grad_(False)


def _added(state: dict[str, Tensor], net: ControlNet, unet_weights: Callable) -> dict[str, Tensor]:
    """Differences with the UNet's weights; of an inpainting one, those that see latents."""
    own = unet_weights([name for name in state if name.startswith(("time_embed.", "input_blocks.", "middle_block."))])
    first = "input_blocks.0.0.weight"
    own[first] = own[first][:, : net.in_channels]
    return state | {name: state[name] + weight.float() for name, weight in own.items()}


def _build_checked(config: Config) -> tuple[CLIP, UNet, VAE]:
    with damaged("no model has its configuration"):
        return build(config)


def _states(
    models: Mapping[str, nn.Module], opened: Opened, ema: bool, device: str | torch.device, dtype: torch.dtype | None
) -> dict[str, dict[str, Tensor]]:
    """The file's tensors for models on the meta device. Nothing is converted before all names and shapes fit."""
    if ema and not any(name.startswith("model_ema.") for name in opened.tensors):
        raise CheckpointError("has no EMA weights (model_ema.*); load it without EMA")
    wanted = {part: _wanted(part, model, ema) for part, model in models.items()}
    used = [pair for names in wanted.values() for pair in names.values()]
    _check(opened, used)
    states = {part: _state(opened, names, torch.device(device), dtype) for part, names in wanted.items()}
    absent = tuple(prefix for part, prefix in PREFIXES.items() if part not in models)
    left = opened.tensors.keys() - dict(used).keys() - {TOKEN_IDS}
    _tell_leftovers({name for name in left if not name.startswith(absent)})
    return states


def _tell_leftovers(leftovers: set[str]) -> None:
    log.debug("ignored %d other tensors: %s", len(leftovers), ", ".join(sorted(leftovers)))
    if "ztsnr" in leftovers:
        log.warning("trained down to noise alone (zero terminal SNR): draw with --schedule ztsnr")
    if foreign := unusual(leftovers):
        log.warning("left out %d tensors that are no part of the model: %s", len(foreign), some(foreign))


def _wanted(part: str, model: nn.Module, ema: bool) -> Wanted:
    averaged = ema and part == "unet"
    named = {name: ema_name(name) if averaged else PREFIXES[part] + name for name in model.state_dict()}
    return {name: (named[name], tensor.shape) for name, tensor in model.state_dict().items()}


def _check(opened: Opened, used: Iterable[tuple[str, torch.Size]]) -> None:
    """Refuse a file that lacks any of these names, or holds other shapes or other than plain numbers there."""
    shapes = dict(used)
    _check_shapes(opened.tensors, shapes)
    _check_storage(opened, shapes)
    if scales := [name for name in opened.tensors if name == "scaled_fp8" or name.endswith(_SCALES)]:
        raise CheckpointError(f"its weights are fp8 with scales beside them ({some(scales)}); plain fp8 is read")


def _state(opened: Opened, wanted: Wanted, device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {name: _parameter(opened, stored, shape, device, dtype) for name, (stored, shape) in wanted.items()}


def _check_shapes(tensors: dict[str, Tensor], wanted: dict[str, torch.Size]) -> None:
    if missing := [name for name in wanted if name not in tensors]:
        raise CheckpointError(f"lacks {len(missing)} of {len(wanted)} tensors: {some(missing)}")
    expected = dict(wanted)
    if TOKEN_TABLE in wanted and TOKEN_IDS in tensors:
        expected[TOKEN_TABLE] = _compact_shape(tensors[TOKEN_IDS], wanted[TOKEN_TABLE])
    wrong = {name: tuple(tensors[name].shape) for name, shape in expected.items() if tensors[name].shape != shape}
    if wrong:
        details = [f"{name} is {shape}, not {tuple(expected[name])}" for name, shape in wrong.items()]
        raise CheckpointError(f"{len(wrong)} of {len(wanted)} tensors have another shape: {some(details)}")


def _check_storage(opened: Opened, wanted: Iterable[str]) -> None:
    """Plain numbers that the file really holds: a pickle can claim any size, with strides of 0."""
    tensors = {name: opened.tensors[name] for name in wanted}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{name} is not a plain tensor")
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(f"{name} holds {tensor.dtype}, not fp8, fp16, bf16, fp32 or fp64")
    check_size(tensors.values(), opened.size)


def _parameter(
    opened: Opened, stored: str, shape: torch.Size, device: torch.device, dtype: torch.dtype | None
) -> Tensor:
    tensor = opened.tensors[stored]
    if tensor.dtype in _FP8:
        tensor = tensor.to(torch.float16)  # which holds all of its numbers
    dtype = dtype or tensor.dtype
    _check_finite(stored, tensor, dtype)
    converted = tensor.to(device, dtype).contiguous()
    if opened.mapped:  # what is used of it comes back from the system's cache
        drop_pages(opened.tensors[stored])
    if converted.shape != shape:
        return _expanded(converted, opened.tensors[TOKEN_IDS], shape)
    return converted


def _check_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Infinities and NaNs both show in the extremes, at memory speed; isfinite().all() takes 30 times as long."""
    if tensor.numel() == 0:
        raise CheckpointError(f"{name} is empty")
    low, high = (extreme.item() for extreme in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(f"{name} holds NaN or infinite weights; the file is damaged or its training diverged")
    if low == high == 0 and tensor.ndim > 1:
        log.warning("%s is all zeros: the file may have been cut and padded; fetch it again", name)
    if max(-low, high) > torch.finfo(dtype).max:
        raise CheckpointError(f"{name} holds weights beyond the range of {dtype}; load it in fp32 or bf16")


def _compact_shape(ids: Tensor, full: torch.Size) -> torch.Size:
    """The token table's shape in a file that holds only the rows with these numbers."""
    if ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64) or ids.numel() > full[0]:
        raise CheckpointError(f"{TOKEN_IDS} is not a list of token ids")
    if ids.unique().numel() != ids.numel() or ids.min() < 0 or ids.max() >= full[0]:
        raise CheckpointError(f"{TOKEN_IDS} repeats an id or has one outside 0 to {full[0] - 1}")
    if 4 * full.numel() > _LARGEST_TABLE:
        raise CheckpointError(f"its token table would grow to {tuple(full)}")
    return torch.Size((ids.numel(), full[1]))


def _expanded(rows: Tensor, ids: Tensor, shape: torch.Size) -> Tensor:
    """rows [n, C] at the numbers ids [n] of a table [tokens, C], zeros elsewhere."""
    table = rows.new_zeros(shape)
    table[ids.to(rows.device, torch.int64)] = rows
    return table

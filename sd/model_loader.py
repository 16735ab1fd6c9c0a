"""Read and write checkpoints in the original layout of Stable Diffusion 1.x, without running what is in them.

A checkpoint is a .safetensors file, a .ckpt pickle, or the index of a split .safetensors; which one is decided by
the file's first bytes. Weights are memory-mapped: parameters of the file's own type on the CPU are the file, and others
are converted tensor by tensor. Module names are the checkpoint's names after three prefixes, so loading is strict.
"""

import ctypes
import io
import json
import logging
import math
import mmap
import os
import pickletools
import re
import sys
import tempfile
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sd.clip import CLIP
from sd.config import Config, TextConfig, UNetConfig, VAEConfig
from sd.unet import UNet
from sd.vae import VAE

log = logging.getLogger(__name__)

PREFIXES = {
    "clip": "cond_stage_model.transformer.text_model.",
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
}
TOKEN_TABLE = PREFIXES["clip"] + "embeddings.token_embedding.weight"
TOKEN_IDS = PREFIXES["clip"] + "embeddings.token_embedding.ids"

StrPath = str | os.PathLike


class CheckpointError(ValueError):
    """What is wrong with which checkpoint and what to do about it, in one line."""


# ---------------------------------------------------------------------------------------------------------------------
# The interface
# ---------------------------------------------------------------------------------------------------------------------


def load(
    path: StrPath, *, ema: bool = False, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Config, CLIP, UNet, VAE]:
    """Build the models that a checkpoint describes and fill them: in eval mode, without gradients.

    ema: take the UNet from the averaged weights `model_ema.*` that training checkpoints carry beside the others.
    dtype: with the file's own type on the CPU, the parameters are the mapped file (copy on write: changing one does not
        change the file). Otherwise each tensor is converted by itself and its pages of the file are let go.

    Raises CheckpointError if the file is not a whole Stable Diffusion 1.x checkpoint of finite numbers.
    """
    with _naming(path):
        opened = _open(Path(path))
        config = _config_of(opened)
        models = _build_checked(config)
        _fill(models, opened, ema, torch.device(device), dtype)
    return config, *models


def save(
    path: StrPath,
    config: Config,
    clip: CLIP,
    unet: UNet,
    vae: VAE,
    *,
    token_ids: Sequence[int] | Tensor | None = None,
    max_bytes: int | None = None,
) -> None:
    """Write the models as .safetensors, with their configuration in the metadata, under a temporary name first.

    Writing over the file that the models are mapped from is fine.

    token_ids: write only these rows of the token table; they load with zeros in place of the others.
    max_bytes: split the weights into files NAME-00001-of-0000N.safetensors no larger than this (a larger tensor has
        a file to itself) and write NAME.safetensors.index.json, which is what to load.

    Raises CheckpointError if it cannot be written or the modules are not those of the configuration.
    """
    with _naming(path):
        tensors = _tensors_to_save(config, (clip, unet, vae), token_ids)
        metadata = {"format": "pt", "config": config.to_json()}
        if max_bytes is None:
            _write(Path(path), tensors, metadata)
        else:
            _write_split(Path(path), tensors, metadata, max_bytes)


def read_state_dict(path: StrPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a checkpoint by name, memory-mapped where the format allows it, and its metadata.

    Names are the original layout's, also in files that leave out `text_model.`. Raises CheckpointError.
    """
    with _naming(path):
        opened = _open(Path(path))
    return opened.tensors, opened.metadata


def infer_config(state_dict: dict[str, Tensor]) -> Config:
    """Tell the configuration from the tensors' shapes.

    What shapes cannot say is SD 1's: 8 UNet heads, 32 norm groups, text heads of 64, scale factor 0.18215, pictures of
    512. Raises CheckpointError for another family of models, named, and for missing tensors.
    """
    _refuse_other_families(state_dict)
    shapes = _Shapes(state_dict)
    return Config(
        text=_infer_text(shapes.under(PREFIXES["clip"])),
        unet=_infer_unet(shapes.under(PREFIXES["unet"])),
        vae=_infer_vae(shapes.under(PREFIXES["vae"])),
        name="Stable Diffusion 1.x",
    )


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


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def _naming(path: StrPath) -> Iterator[None]:
    """Begin the checkpoint errors of the body with the path."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(_one_line(f"{os.fspath(path)}: {error}")) from error.__cause__


@contextmanager
def _damaged(what: str) -> Iterator[None]:
    """Turn whatever the body raises into a checkpoint error: damaged files fail in too many ways to list them."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what} ({_short(error)})") from error


def _short(error: Exception) -> str:
    """The end of torch's message holds the reason; its beginning advises to unpickle without protection."""
    text = str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__
    return text.splitlines()[0][:160]


def _one_line(text: str) -> str:
    """Names in messages come from the file: no line breaks, no terminal codes, no megabytes."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text.split())[:600]


def _some(names: Iterable[str], shown: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(name[:100] for name in names[:shown]) + more


# ---------------------------------------------------------------------------------------------------------------------
# Reading: any of the formats to tensors by name
# ---------------------------------------------------------------------------------------------------------------------

_HEAD_BYTES = 512
_LARGEST_HEADER = 100_000_000  # what safetensors accepts
_MOST_TENSORS = 20_000  # of one configuration; SD 1.5 has 1,130
_LARGEST_PICKLE = 8 << 20  # bytes; of SD 1.5 it is 0.2 MB, the weights lying outside it


@dataclass(frozen=True)
class _Opened:
    """A checkpoint's tensors and metadata, its size in bytes, and whether the tensors are the mapped file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    size: int
    mapped: bool


def _open(path: Path) -> _Opened:
    head = _head(path)
    with _damaged("a damaged checkpoint; fetch it again"):
        opened = _reader(head)(path)
    return replace(opened, tensors=_with_text_level(opened.tensors))


def _head(path: Path) -> bytes:
    """The first bytes of a regular file; an error for what is known not to hold weights."""
    if path.is_dir():
        raise CheckpointError("a folder; name the .safetensors or .ckpt file in it")
    if not path.exists():
        raise CheckpointError("no such file")
    if not path.is_file():
        raise CheckpointError("not a regular file")
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot be opened ({error.strerror})") from error
    if problem := _not_weights(head):
        raise CheckpointError(problem)
    return head


def _not_weights(head: bytes) -> str | None:
    if not head:
        return "an empty file; fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the weights; run `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "a web page, not weights; download the file itself"
    return None


def _reader(head: bytes):
    if head.startswith(b"PK\x03\x04"):
        return _read_zip
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
        return _read_safetensors
    if head.lstrip()[:1] == b"{":
        return _read_index
    return _read_legacy


def _read_safetensors(path: Path) -> _Opened:
    with _damaged("a truncated or damaged safetensors file; fetch it again"), safe_open(path, framework="pt") as file:
        return _Opened(file.get_tensors(), file.metadata() or {}, path.stat().st_size, mapped=True)


def _read_index(path: Path) -> _Opened:
    """A checkpoint split in the Hugging Face convention: which tensor is in which of the files beside the index."""
    with _damaged("not a checkpoint, nor the index of a split one"):
        index = json.loads(path.read_bytes())
        files = {name: _beside(path, file) for name, file in index["weight_map"].items()}
    parts = {file: _read_part(file) for file in sorted(set(files.values()))}
    if absent := [name for name, file in files.items() if name not in parts[file].tensors]:
        raise CheckpointError(f"the files of this split checkpoint lack {_some(absent)}")
    metadata = {key: str(value) for key, value in (index.get("metadata") or {}).items()}
    first = next(iter(parts.values())).metadata if parts else {}
    tensors = {name: parts[file].tensors[name] for name, file in files.items()}
    return _Opened(tensors, {**first, **metadata}, sum(part.size for part in parts.values()), mapped=True)


def _read_part(path: Path) -> _Opened:
    with _naming(path.name):
        if _reader(_head(path)) is not _read_safetensors:
            raise CheckpointError("not a safetensors file")
        return _read_safetensors(path)


def _beside(index: Path, file: str) -> Path:
    if file in ("", ".", "..") or Path(file).name != file:
        raise CheckpointError(f"the index names a file outside its folder: {file}")
    return index.with_name(file)


def _with_text_level(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some versions of transformers wrote the text encoder without the level `text_model.`."""
    full = PREFIXES["clip"]
    outer = full.removesuffix("text_model.")
    if any(name.startswith(full) for name in tensors):
        return tensors
    return {full + name[len(outer) :] if name.startswith(outer) else name: t for name, t in tensors.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Pickles: read by torch's weights_only unpickler, which calls nothing but what it is told to
# ---------------------------------------------------------------------------------------------------------------------

_ALLOWED = re.compile(
    r"collections\.(OrderedDict|Counter)|builtins\.set|_codecs\.encode"
    r"|torch\._utils\.(_rebuild_tensor|_rebuild_tensor_v2|_rebuild_parameter)"
    r"|torch\.(Size|device|b?float\d+|u?int\d+|bool)"
    r"|torch\.(Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)
# What training leaves in a checkpoint beside the weights: read as objects that do nothing.
_INERT = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|lightning_utilities)\..*"
    r"|numpy\.(core|_core)\.multiarray\.scalar|numpy\.dtype|numpy\.dtypes\.\w+|numpy\.(bool|u?int|float)\w*",
    re.DOTALL,
)


class _Inert:
    """Stands for a class that is not there: takes any arguments and any state, and does nothing with them."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class _InertDict:
    """Stands for a dict's subclass; the unpickler fills nothing but dict and OrderedDict themselves."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


def _read_zip(path: Path) -> _Opened:
    with _damaged("a truncated or damaged .ckpt; fetch it again"):
        names = _pickle_globals(_zipped_pickle(path))
        _refuse_globals(names)
        content = _unpickle_mapped(path, names)
    return _Opened(_state_dict_of(content), {}, path.stat().st_size, mapped=True)


def _read_legacy(path: Path) -> _Opened:
    """torch.save before 1.6: five pickles and then the weights, which torch cannot map."""
    with _damaged("not a checkpoint: neither safetensors nor a PyTorch pickle"):
        names = _legacy_globals(path)
    _refuse_globals(names)
    with _damaged("a truncated or damaged .ckpt; fetch it again"), open(path, "rb") as file:
        content = _unpickle(file, names, mapped=False)
    return _Opened(_state_dict_of(content), {}, path.stat().st_size, mapped=False)


def _zipped_pickle(path: Path) -> io.BytesIO:
    with zipfile.ZipFile(path) as archive:
        records = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
        if len(records) != 1:
            raise CheckpointError("a zip archive, but not one that torch.save writes")
        if records[0].file_size > _LARGEST_PICKLE:
            raise CheckpointError(f"its pickle of {records[0].file_size} bytes is too large for a checkpoint")
        return io.BytesIO(archive.read(records[0]))


def _legacy_globals(path: Path) -> set[str]:
    """Names in the five pickles: magic number, version, machine, the object, and its storages' keys.

    Only the beginning is read: a damaged length must not read gigabytes.
    """
    with open(path, "rb") as file:
        data = io.BytesIO(file.read(_LARGEST_PICKLE))
    names = _pickle_globals(data)
    with _damaged("a truncated or damaged .ckpt; fetch it again"):
        for _ in range(0 if names else 4):
            names |= _pickle_globals(data)
    return names


def _pickle_globals(data: io.BytesIO) -> set[str]:
    """The full names of all that one pickle would import, without running it."""
    names: set[str] = set()
    strings: list[str] = []
    for opcode, arg, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            names.add(_python3_name(*arg.split(" ", 1)))
        elif opcode.name == "STACK_GLOBAL":
            names.add(".".join(strings[-2:]))
        elif isinstance(arg, str):
            strings.append(arg)
    return names


def _python3_name(module: str, name: str) -> str:
    """Pickles of protocol 2 hold Python 2's names; the unpickler maps them like this before it looks them up."""
    if (module, name) in NAME_MAPPING:
        return ".".join(NAME_MAPPING[module, name])
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"


def _refuse_globals(names: set[str]) -> None:
    refused = sorted(name for name in names if not _ALLOWED.fullmatch(name) and not _INERT.fullmatch(name))
    if refused:
        raise CheckpointError(f"refuses to run {_some(refused)}: this pickle holds more than weights; do not trust it")


def _unpickle_mapped(path: Path, names: set[str]):
    """Map a zip file. torch reads any path that ends in .safetensors as that format, hence the link."""
    if path.suffix != ".safetensors":
        return _unpickle(path, names, mapped=True)
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "weights.ckpt")
        link.symlink_to(path.resolve())
        return _unpickle(link, names, mapped=True)


def _unpickle(source: Path | io.BufferedReader, names: set[str], mapped: bool):
    stand_ins = [(_stand_in(name), name) for name in names if _INERT.fullmatch(name)]
    with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
        warnings.simplefilter("ignore")
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)


def _stand_in(name: str) -> type:
    """A class of its own for each call: leaving safe_globals must not take away another thread's."""
    base = _InertDict if name.endswith("Dict") else _Inert
    return type(base.__name__, (base,), {})


def _state_dict_of(content: object) -> dict[str, Tensor]:
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {type(content).__name__}, not weights by name")
    pairs = content.items()
    return {name: t.detach() for name, t in pairs if isinstance(name, str) and isinstance(t, Tensor)}


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: from the metadata, else from the shapes
# ---------------------------------------------------------------------------------------------------------------------


def _config_of(opened: _Opened) -> Config:
    if "config" in opened.metadata:
        with _damaged("the configuration in its metadata is bad"):
            config = Config.from_json(opened.metadata["config"])
            _check_config(config, len(opened.tensors))
    else:
        with _damaged("not the layout of Stable Diffusion 1.x"):
            config = infer_config(opened.tensors)
            _check_config(config, len(opened.tensors))
    return config


def _build_checked(config: Config) -> tuple[CLIP, UNet, VAE]:
    with _damaged("no model has its configuration"):
        return build(config)


def _check_config(config: Config, tensors: int) -> None:
    """Refuse numbers that no model has, before anything is built from them."""
    text, unet, vae = config.text, config.unet, config.vae
    if not all(_positive(part) for part in (text, unet, vae)) or config.image_size < 1:
        raise CheckpointError("its configuration has a number that is not positive")
    if (least := _fewest_tensors(config)) > min(tensors, _MOST_TENSORS):
        raise CheckpointError(f"its configuration needs over {least} tensors; the file has {tensors}")
    _check_parts_agree(text, unet, vae)
    if text.width % text.heads or any(unet.model_channels * m % unet.num_heads for m in unet.channel_mult):
        raise CheckpointError("its configuration has widths that are not a multiple of the attention heads")


def _check_parts_agree(text: TextConfig, unet: UNetConfig, vae: VAEConfig) -> None:
    if unet.in_channels != vae.z_channels:
        kind = {9: "an inpainting model", 8: "an image-editing model"}.get(unet.in_channels, "another kind of model")
        raise CheckpointError(f"{kind} ({unet.in_channels} input channels); a text-to-image one is needed")
    if unet.context_dim != text.width:
        kind = "Stable Diffusion 2" if unet.context_dim == 1024 else "not Stable Diffusion 1.x"
        raise CheckpointError(f"{kind} (context of {unet.context_dim}, text encoder of {text.width})")


def _positive(part: TextConfig | UNetConfig | VAEConfig) -> bool:
    for name, value in vars(part).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if name != "attention_levels" and not (numbers and all(number > 0 for number in numbers)):
            return False
    return True


def _fewest_tensors(config: Config) -> int:
    """A lower bound of the tensors that the configuration has, counted without building it."""
    unet, vae = config.unet, config.vae
    blocks = 2 * unet.num_res_blocks + 1
    attention = 1 + blocks * len(set(unet.attention_levels) & set(range(len(unet.channel_mult))))
    transformers = 20 * unet.transformer_depth * attention
    residuals = 10 * blocks * len(unet.channel_mult) + 8 * (2 * vae.num_res_blocks + 1) * len(vae.ch_mult)
    return 16 * config.text.layers + transformers + residuals


class _Shapes:
    """Shapes by name under one prefix."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str = ""):
        self.tensors = tensors
        self.prefix = prefix

    def under(self, prefix: str) -> "_Shapes":
        inner = {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}
        return _Shapes(inner, self.prefix + prefix)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> torch.Size:
        if name not in self.tensors:
            raise CheckpointError(f"not a whole Stable Diffusion 1.x checkpoint: it lacks {self.prefix}{name}")
        return self.tensors[name].shape

    def count(self, prefix: str) -> int:
        """How many modules are in the list of this name: `encoder.layers.` -> 12."""
        return len({name[len(prefix) :].split(".")[0] for name in self.tensors if name.startswith(prefix)})


def _infer_text(shapes: _Shapes) -> TextConfig:
    vocab_size, width = shapes["embeddings.token_embedding.weight"]
    if "embeddings.token_embedding.ids" in shapes:
        vocab_size = TextConfig.vocab_size
    return TextConfig(
        vocab_size=vocab_size,
        width=width,
        layers=shapes.count("encoder.layers."),
        heads=max(1, width // 64),
        max_length=shapes["embeddings.position_embedding.weight"][0],
    )


def _infer_unet(shapes: _Shapes) -> UNetConfig:
    model_channels, in_channels = shapes["input_blocks.0.0.weight"][:2]
    levels = _unet_levels(shapes)
    return UNetConfig(
        in_channels=in_channels,
        out_channels=shapes["out.2.weight"][0],
        model_channels=model_channels,
        channel_mult=tuple(
            shapes[f"input_blocks.{level[0]}.0.out_layers.3.weight"][0] // model_channels for level in levels
        ),
        num_res_blocks=len(levels[0]),
        attention_levels=tuple(
            i for i, level in enumerate(levels) if f"input_blocks.{level[0]}.1.norm.weight" in shapes
        ),
        transformer_depth=shapes.count("middle_block.1.transformer_blocks."),
        context_dim=shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
    )


def _unet_levels(shapes: _Shapes) -> list[list[int]]:
    """The numbers of each level's residual blocks among the input blocks; a downsampling begins a new level."""
    levels: list[list[int]] = [[]]
    for block in range(1, shapes.count("input_blocks.")):
        if f"input_blocks.{block}.0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append(block)
    return levels


def _infer_vae(shapes: _Shapes) -> VAEConfig:
    ch, in_channels = shapes["encoder.conv_in.weight"][:2]
    levels = range(shapes.count("encoder.down."))
    return VAEConfig(
        in_channels=in_channels,
        ch=ch,
        ch_mult=tuple(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] // ch for level in levels),
        num_res_blocks=shapes.count("encoder.down.0.block."),
        z_channels=shapes["post_quant_conv.weight"][0],
    )


# How the tensors of other models are called. The first that fits is named.
_OTHER_FAMILIES = (
    (r"conditioner\.embedders\.", "Stable Diffusion XL"),
    (r"cond_stage_model\.model\.", "Stable Diffusion 2"),
    (r"model\.diffusion_model\.joint_blocks\.", "Stable Diffusion 3"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "Flux"),
    (r".*(lora_(unet|te|up|down|A|B)|\.lora\.|hada_w1|lokr_w)", "a LoRA, a change to a checkpoint and not one itself"),
    (r"control_model\.|controlnet_", "a ControlNet"),
    (r"(unet\.)?(down|up)_blocks\.|(en|de)coder\.(down|up)_blocks\.", "one model of the diffusers layout"),
)


def _refuse_other_families(names: Iterable[str]) -> None:
    names = list(names)
    for pattern, family in _OTHER_FAMILIES:
        begins = re.compile(pattern).match
        if any(begins(name) for name in names):
            raise CheckpointError(f"this is {family}; Stable Diffusion 1.x in the original layout is needed")


# ---------------------------------------------------------------------------------------------------------------------
# Filling the models
# ---------------------------------------------------------------------------------------------------------------------

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST_TABLE = 1 << 30  # bytes that a compact token table may expand to; SD 1.5's in fp32 is 0.15 GB


Wanted = dict[str, tuple[str, torch.Size]]
"""For each tensor of a module: its name in the file and its shape."""


def _fill(models: Sequence[nn.Module], opened: _Opened, ema: bool, device: torch.device, dtype: torch.dtype) -> None:
    """Load the file's tensors into models on the meta device. Nothing is converted before all names and shapes fit."""
    if ema and not any(name.startswith("model_ema.") for name in opened.tensors):
        raise CheckpointError("has no EMA weights (model_ema.*); load it without EMA")
    wanted = [_wanted(part, model, ema) for part, model in zip(PREFIXES, models, strict=True)]
    shapes = {source: shape for names in wanted for source, shape in names.values()}
    _check_shapes(opened.tensors, shapes)
    _check_storage(opened, shapes)
    for model, names in zip(models, wanted, strict=True):
        state = {name: _parameter(opened, source, shape, device, dtype) for name, (source, shape) in names.items()}
        model.load_state_dict(state, strict=True, assign=True)
        model.eval().requires_grad_(False)
    leftovers = opened.tensors.keys() - shapes.keys() - {TOKEN_IDS}
    log.debug("ignored %d other tensors: %s", len(leftovers), ", ".join(sorted(leftovers)))


def _wanted(part: str, model: nn.Module, ema: bool) -> Wanted:
    averaged = ema and part == "unet"
    named = {name: ema_name(name) if averaged else PREFIXES[part] + name for name in model.state_dict()}
    return {name: (named[name], tensor.shape) for name, tensor in model.state_dict().items()}


def ema_name(name: str) -> str:
    """What the original code's LitEma calls a UNet tensor: `out.2.bias` -> `model_ema.diffusion_modelout2bias`."""
    return "model_ema." + f"diffusion_model.{name}".replace(".", "")


def _check_shapes(tensors: dict[str, Tensor], wanted: dict[str, torch.Size]) -> None:
    if missing := [name for name in wanted if name not in tensors]:
        raise CheckpointError(f"lacks {len(missing)} of {len(wanted)} tensors: {_some(missing)}")
    expected = {**wanted, **_compact_shape(tensors, wanted[TOKEN_TABLE])}
    wrong = {name: tuple(tensors[name].shape) for name, shape in expected.items() if tensors[name].shape != shape}
    if wrong:
        details = [f"{name} is {shape}, not {tuple(expected[name])}" for name, shape in wrong.items()]
        raise CheckpointError(f"{len(wrong)} of {len(wanted)} tensors have another shape: {_some(details)}")


def _check_storage(opened: _Opened, wanted: Iterable[str]) -> None:
    """Plain numbers that the file really holds: a pickle can claim any size, with strides of 0."""
    tensors = {name: opened.tensors[name] for name in wanted}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{name} is not a plain tensor")
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(f"{name} holds {tensor.dtype}, not fp16, bf16, fp32 or fp64")
    if (claimed := sum(tensor.nbytes for tensor in tensors.values())) > opened.size:
        raise CheckpointError(f"claims {claimed} bytes of weights in a file of {opened.size}")


def _parameter(opened: _Opened, source: str, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    tensor = opened.tensors[source]
    _check_finite(source, tensor, dtype)
    converted = tensor.to(device, dtype).contiguous()
    if opened.mapped and converted.data_ptr() != tensor.data_ptr():
        _let_go(tensor)
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
    if max(-low, high) > torch.finfo(dtype).max:
        raise CheckpointError(f"{name} holds weights beyond the range of {dtype}; load it in fp32 or bf16")


def _let_go(tensor: Tensor) -> None:
    """Tell the system that a mapped tensor's pages are not needed now, or they count as this process's memory.

    They are read again from the file if anything touches them. Only for file mappings: it would clear other memory.
    """
    if not sys.platform.startswith("linux"):
        return
    storage = tensor.untyped_storage()
    first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _compact_shape(tensors: dict[str, Tensor], full: torch.Size) -> dict[str, torch.Size]:
    """The token table's shape in a file that holds only the rows numbered in TOKEN_IDS; {} for a full table."""
    if TOKEN_IDS not in tensors:
        return {}
    ids = tensors[TOKEN_IDS]
    if ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64) or ids.numel() > full[0]:
        raise CheckpointError(f"{TOKEN_IDS} is not a list of token ids")
    if ids.unique().numel() != ids.numel() or ids.min() < 0 or ids.max() >= full[0]:
        raise CheckpointError(f"{TOKEN_IDS} repeats an id or has one outside 0 to {full[0] - 1}")
    if 4 * full.numel() > _LARGEST_TABLE:
        raise CheckpointError(f"its token table would grow to {tuple(full)}")
    return {TOKEN_TABLE: torch.Size((ids.numel(), full[1]))}


def _expanded(rows: Tensor, ids: Tensor, shape: torch.Size) -> Tensor:
    """rows [n, C] at the numbers ids [n] of a table [tokens, C], zeros elsewhere."""
    table = rows.new_zeros(shape)
    table[ids.to(rows.device, torch.int64)] = rows
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def _tensors_to_save(
    config: Config, models: tuple[CLIP, UNet, VAE], token_ids: Sequence[int] | Tensor | None
) -> dict[str, Tensor]:
    tensors = {
        PREFIXES[part] + name: tensor.detach().cpu()
        for part, model in zip(PREFIXES, models, strict=True)
        for name, tensor in model.state_dict().items()
    }
    _check_same_modules(config, tensors)
    if token_ids is not None:
        tensors[TOKEN_IDS] = torch.as_tensor(token_ids, dtype=torch.int64).cpu()
        tensors[TOKEN_TABLE] = tensors[TOKEN_TABLE][tensors[TOKEN_IDS]]
    return _unshared(tensors)


def _check_same_modules(config: Config, tensors: dict[str, Tensor]) -> None:
    models = zip(PREFIXES, build(config), strict=True)
    wanted = {PREFIXES[part] + name: t.shape for part, model in models for name, t in model.state_dict().items()}
    if changed := {name for name in wanted.keys() | tensors.keys() if _shape(tensors, name) != wanted.get(name)}:
        raise CheckpointError(
            f"cannot be written: the models differ from their configuration, or an optimization "
            f"has changed their modules ({_some(sorted(changed))})"
        )


def _shape(tensors: dict[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory: safetensors takes no others."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone(memory_format=torch.contiguous_format) if address in seen else tensor.contiguous()
        seen.add(address)
    return result


@contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside path, renamed to it if the body succeeds: a file is there whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        permissions = part.stat().st_mode
        yield part
        part.chmod(permissions)  # safetensors makes files that only their owner can read
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot be written ({error})") from error
    finally:
        part.unlink(missing_ok=True)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with _written_whole(path) as part:
        save_file(tensors, part, metadata=metadata)


def _write_split(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], max_bytes: int) -> None:
    """The files first and the index last, so that an index never names a file that is not there."""
    path = path.with_name(path.name.removesuffix(".index.json"))
    shards = list(_shards(tensors, max_bytes))
    files = [f"{path.stem}-{i:05d}-of-{len(shards):05d}{path.suffix}" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        _write(path.with_name(file), shard, metadata)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    with _written_whole(path.with_name(path.name + ".index.json")) as part:
        part.write_text(json.dumps({"metadata": {**metadata, **total}, "weight_map": weight_map}, indent=1) + "\n")


def _shards(tensors: dict[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    room = max_bytes
    for name, tensor in tensors.items():
        if shard and tensor.nbytes > room:
            yield shard
            shard, room = {}, max_bytes
        shard[name] = tensor
        room -= tensor.nbytes
    yield shard

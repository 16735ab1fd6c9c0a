"""Pickles: read by torch's weights_only unpickler, which calls nothing but what it is told to."""

import io
import pickletools
import re
import tempfile
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from sd.checkpoints.errors import CheckpointError, damaged, some

_LARGEST_PICKLE = 8 << 20  # bytes; of SD 1.5 it is 0.2 MB, the weights lying outside it

_ALLOWED = re.compile(
    r"collections\.(OrderedDict|Counter)|builtins\.set|_codecs\.encode"
    r"|torch\._utils\.(_rebuild_tensor|_rebuild_tensor_v2|_rebuild_parameter)"
    r"|torch\.(Size|device|b?float\d+|u?int\d+|bool)"
    r"|torch\.(Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)

# What training leaves in a checkpoint beside the weights: read as objects that do nothing.
_INERT = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|lightning_utilities)\..*"
    r"|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)|numpy\.(dtype|ndarray)|numpy\.dtypes\.\w+"
    r"|numpy\.(bool|u?int|float)\w*|torch\.nn\.modules\.container\.Parameter(Dict|List)"
    r"|collections\.defaultdict|pathlib\.\w*Path|argparse\.Namespace|types\.SimpleNamespace|omegaconf\..*"
    r"|builtins\.(frozenset|list|dict|tuple|int|float|str|bool|object)",
    re.DOTALL,
)


_STATE_DICTS = ("state_dict", "model", "module", "model_state_dict")
"""Under which trainers keep the weights, one within another up to _DEEPEST times."""

_DEEPEST = 3


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


class _Kept(_Inert):
    """The same, but its state can be looked at: that of a module that holds weights."""

    def __setstate__(self, state):
        self.state = state


def read_zip(path: Path) -> dict[str, Tensor]:
    """The tensors of a zip file as torch.save writes it, mapped."""
    return _state_dict_of(zip_content(path))


def zip_content(path: Path) -> object:
    """All that such a file holds."""
    with damaged("a truncated or damaged .ckpt; fetch it again"):
        names = _pickle_globals(_zipped_pickle(path))
        _refuse_globals(names)
        return _unpickle_mapped(path, names)


def read_legacy(path: Path) -> dict[str, Tensor]:
    """torch.save before 1.6: five pickles and then the weights, which torch cannot map."""
    return _state_dict_of(legacy_content(path))


def legacy_content(path: Path) -> object:
    """All that such a file holds."""
    with damaged("not a checkpoint: neither safetensors nor a PyTorch pickle"):
        names = _legacy_globals(path)
    _refuse_globals(names)
    with damaged("a truncated or damaged .ckpt; fetch it again"), open(path, "rb") as file:
        return _unpickle(file, names, mapped=False)


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
    with damaged("a truncated or damaged .ckpt; fetch it again"):
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
        raise CheckpointError(f"refuses to run {some(refused)}: this pickle holds more than weights; do not trust it")


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
    kept = _Kept if ".ParameterDict" in name else None
    base = kept or (_InertDict if name.lower().endswith("dict") else _Inert)
    return type(base.__name__, (base,), {})


def _state_dict_of(content: object) -> dict[str, Tensor]:
    for _ in range(_DEEPEST):
        inner = (content.get(key) for key in _STATE_DICTS) if isinstance(content, dict) else ()
        content = next((found for found in inner if isinstance(found, dict)), content)
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {type(content).__name__}, not weights by name")
    pairs = content.items()
    return {name: t.detach() for name, t in pairs if isinstance(name, str) and isinstance(t, Tensor)}

"""From a file, or an index and the files beside it, to tensors by name: the first bytes decide how it is read."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, strided

from sd.checkpoints.errors import CheckpointError, damaged, naming, some
from sd.checkpoints.layouts import with_text_level
from sd.checkpoints.pickles import legacy_content, read_legacy, read_zip, zip_content
from sd.config import Config

_HEAD_BYTES = 512

_LARGEST_KNOWN = 100_000_000  # what safetensors itself accepts
LARGEST_HEADER, LARGEST_INDEX = 32 << 20, 8 << 20  # bytes: those of SD 1.5 take 0.2 MB, metadata of training a few
MOST_TENSORS, MOST_FILES = 20_000, 1_000  # that they list


@dataclass(frozen=True)
class Opened:
    """A checkpoint's tensors and metadata, its size in bytes, and whether the tensors are the mapped file.

    marks: what its layout says of the family, where the tensors' names and shapes are SD 1's. config: that of a folder,
    which says it in words.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    size: int
    mapped: bool
    marks: frozenset[str] = frozenset()
    config: Config | None = None


def open_checkpoint(path: Path) -> Opened:
    """Read any of the formats; names are the original layout's. Raises CheckpointError without the path."""
    head = _head(path)
    with damaged("a damaged checkpoint; fetch it again"):
        opened = _reader(head)(path)
    return replace(opened, tensors=with_text_level(opened.tensors))


def open_content(path: Path) -> object:
    """What a safetensors file or a pickle holds, as it is. Raises CheckpointError without the path."""
    head = _head(path)
    with damaged("a damaged file; fetch it again"):
        if (reader := _reader(head)) is _read_safetensors:
            return _read_safetensors(path).tensors
        return zip_content(path) if reader is _read_zip else legacy_content(path)


def check_size(tensors: Iterable[Tensor], size: int) -> None:
    """Raise CheckpointError for what claims more bytes than its file has: a pickle can, with strides of 0."""
    if (claimed := sum(tensor.nbytes for tensor in tensors if tensor.layout == strided)) > size:
        raise CheckpointError(f"claims {claimed} bytes of weights in a file of {size}")


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
    if head.startswith(b"GGUF"):
        return "a GGUF file, whose weights are quantized for other programs; the .safetensors of the model is needed"
    if head.lstrip()[:1] == b"<":
        return "a web page, not weights; download the file itself"
    return None


def _reader(head: bytes):
    if head.startswith(b"PK\x03\x04"):
        return _read_zip
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_KNOWN:
        return _read_safetensors
    if head.lstrip()[:1] == b"{":
        return _read_index
    return _read_legacy


def _read_zip(path: Path) -> Opened:
    return Opened(read_zip(path), {}, path.stat().st_size, mapped=True)


def _read_legacy(path: Path) -> Opened:
    return Opened(read_legacy(path), {}, path.stat().st_size, mapped=False)


def check_header(path: Path) -> None:
    """Raise CheckpointError for a safetensors file whose header would take long to read, and hold no model."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _LARGEST_KNOWN:
            return  # no safetensors file, as its reader will say
        if size > LARGEST_HEADER:
            raise CheckpointError(f"its header of {size >> 20} MB is no model's; {LARGEST_HEADER >> 20} are read")
        listed = file.read(size).count(b'"data_offsets"')
    if listed > MOST_TENSORS:
        raise CheckpointError(f"it lists {listed} tensors, which are no model's; {MOST_TENSORS} are read")


def _read_safetensors(path: Path) -> Opened:
    check_header(path)
    with damaged("a truncated or damaged safetensors file; fetch it again"), safe_open(path, framework="pt") as file:
        return Opened(file.get_tensors(), file.metadata() or {}, path.stat().st_size, mapped=True)


def _read_index(path: Path) -> Opened:
    """A checkpoint split in the Hugging Face convention: which tensor is in which of the files beside the index."""
    with damaged("not a checkpoint, nor the index of a split one"):
        index = small_json(path)
        _check_index(index["weight_map"])
        files = {name: _beside(path, file) for name, file in index["weight_map"].items()}
    parts = {file: _read_part(file) for file in sorted(set(files.values()))}
    if absent := [name for name, file in files.items() if name not in parts[file].tensors]:
        raise CheckpointError(f"the files of this split checkpoint lack {some(absent)}")
    metadata = {key: str(value) for key, value in (index.get("metadata") or {}).items()}
    first = next(iter(parts.values())).metadata if parts else {}
    tensors = {name: parts[file].tensors[name] for name, file in files.items()}
    return Opened(tensors, {**first, **metadata}, sum(part.size for part in parts.values()), mapped=True)


def _check_index(weight_map: dict[str, str]) -> None:
    if len(weight_map) > MOST_TENSORS or len(set(weight_map.values())) > MOST_FILES:
        raise CheckpointError(f"the index lists more than {MOST_TENSORS} tensors or {MOST_FILES} files: no model does")


def small_json(path: Path, largest: int = LARGEST_INDEX) -> object:
    """What a file of at most so many bytes holds. Raises CheckpointError, OSError, ValueError or RecursionError."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path.name} is not a regular file")  # a pipe would wait for ever
    with open(path, "rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise CheckpointError(f"{path.name} is over {largest >> 20} MB, which no model's is")
    return json.loads(data)


def _read_part(path: Path) -> Opened:
    with naming(path.name):
        if _reader(_head(path)) is not _read_safetensors:
            raise CheckpointError("not a safetensors file")
        return _read_safetensors(path)


def _beside(index: Path, file: str) -> Path:
    if file in ("", ".", "..") or Path(file).name != file:
        raise CheckpointError(f"the index names a file outside its folder: {file}")
    return index.with_name(file)


def files_of(path: Path) -> list[Path]:
    """The files that a checkpoint is: of an index those that it names too, of a folder its models' and settings."""
    if path.is_dir():
        return sorted(file for file in [*path.glob("*.json"), *path.glob("*/*")] if file.suffix in _OF_FOLDERS)
    if path.suffix != ".json":
        return [path]
    names = small_json(path).get("weight_map", {})
    return [path, *(path.with_name(name) for name in sorted(set(names.values())))] if names else files_of(path.parent)


_OF_FOLDERS = (".json", ".safetensors", ".bin")


def written(path: Path) -> tuple[int, ...]:
    """When a checkpoint's files were written, in nanoseconds."""
    return tuple(file.stat().st_mtime_ns for file in files_of(path))

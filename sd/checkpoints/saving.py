"""Writing the models as .safetensors, whole or split, in the original layout."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sd.checkpoints.errors import CheckpointError, StrPath, naming, some
from sd.checkpoints.files import Opened
from sd.checkpoints.layouts import PREFIXES, TOKEN_IDS, TOKEN_TABLE
from sd.checkpoints.sd2 import as_stored, marks_of
from sd.checkpoints.shapes import config_of
from sd.clip import CLIP
from sd.config import Config
from sd.models import build
from sd.unet import UNet
from sd.vae import VAE
from sd.writing import written_whole


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
    with naming(path):
        tensors = _tensors_to_save(config, (clip, unet, vae), token_ids)
        metadata = {"format": "pt", "config": config.to_json()}
        if max_bytes is None:
            _write(Path(path), tensors, metadata)
        else:
            _write_split(Path(path), tensors, metadata, max_bytes)


def write_model(path: Path, config: Config, tensors: dict[str, Tensor]) -> None:
    """Write a whole model, by the names and shapes of SD 1's layout, in the original layout of its family.

    The metadata say of the configuration what the shapes do not. Raises CheckpointError without the path.
    """
    _write(path, _unshared(as_stored(tensors, config)), _what_shapes_do_not_say(config, tensors))


def _what_shapes_do_not_say(config: Config, tensors: dict[str, Tensor]) -> dict[str, str]:
    said = {"format": "pt"}
    if config.text.openclip or config.prediction != "eps":
        said["modelspec.prediction_type"] = {"eps": "epsilon"}.get(config.prediction, config.prediction)
    if config_of(Opened(tensors, said, 0, mapped=False, marks=marks_of(config))) != config:
        said["config"] = config.to_json()
    return said


def _tensors_to_save(
    config: Config, models: tuple[CLIP, UNet, VAE], token_ids: Sequence[int] | Tensor | None
) -> dict[str, Tensor]:
    states = {part: model.state_dict() for part, model in zip(PREFIXES, models, strict=True)}
    named = {PREFIXES[part] + name: tensor for part, state in states.items() for name, tensor in state.items()}
    if odd := [name for name, tensor in named.items() if type(tensor) not in (Tensor, nn.Parameter)]:
        raise CheckpointError(f"cannot be written: some layers are quantized ({some(odd)}); undo that first")
    tensors = {name: tensor.detach().cpu() for name, tensor in named.items()}
    _check_same_modules(config, tensors)
    if token_ids is not None:
        tensors[TOKEN_IDS] = torch.as_tensor(token_ids, dtype=torch.int64).cpu()
        tensors[TOKEN_TABLE] = tensors[TOKEN_TABLE][tensors[TOKEN_IDS]]
    return _unshared(as_stored(tensors, config))


def _check_same_modules(config: Config, tensors: dict[str, Tensor]) -> None:
    models = zip(PREFIXES, build(config), strict=True)
    wanted = {PREFIXES[part] + name: t.shape for part, model in models for name, t in model.state_dict().items()}
    if changed := {name for name in wanted.keys() | tensors.keys() if _shape(tensors, name) != wanted.get(name)}:
        raise CheckpointError(
            f"cannot be written: the models differ from their configuration, or an optimization "
            f"has changed their modules ({some(sorted(changed))})"
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
def _writing(path: Path) -> Iterator[Path]:
    """A temporary name beside path that becomes path; what goes wrong with the file is a CheckpointError."""
    try:
        with written_whole(path) as part:
            yield part
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot be written ({error})") from error


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with _writing(path) as part:
        save_sorted(tensors, part, metadata)


def save_sorted(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """`save_file`, with the metadata sorted: it writes them in any order, and one model shall be the same bytes."""
    save_file(tensors, path, metadata=metadata)
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def _write_split(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], max_bytes: int) -> None:
    """The files first and the index last, so that an index never names a file that is not there."""
    path = path.with_name(path.name.removesuffix(".index.json"))
    shards = list(_shards(tensors, max_bytes))
    files = [f"{path.stem}-{i:05d}-of-{len(shards):05d}{path.suffix}" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        _write(path.with_name(file), shard, metadata)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    with _writing(path.with_name(path.name + ".index.json")) as part:
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

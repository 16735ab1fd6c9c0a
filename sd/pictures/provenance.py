"""What a picture was drawn with, as its PNG says it, so that the same machine can draw it again pixel for pixel."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

LARGEST_INDEX, MOST_FILES = 8 << 20, 1_000
BLOCK = 4096
BLOCKS = 64


class ProvenanceError(ValueError):
    """A file that a picture was drawn with is not there or is another one: which, and which option names it."""


def fingerprint(path: str | os.PathLike) -> str:
    """12 hexadecimal digits that tell checkpoints apart without reading gigabytes, or "" if the file cannot be read.

    They are of the sizes and 64 evenly spaced blocks of 4 KiB of each file; an index stands for the files it names, and
    a folder for its models' and their settings.
    """
    digest = hashlib.sha256()
    try:
        for file in _files(Path(path)):
            for block in _samples(file):
                digest.update(block)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return ""  # whatever is wrong with it, loading it says so
    return digest.hexdigest()[:12]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = [*path.glob("*.json"), *path.glob("*.safetensors"), *path.glob("*.bin"), *path.glob("*/*")]
        return sorted({file for file in found if file.suffix in (".json", ".safetensors", ".bin")})
    if path.suffix != ".json":
        return [path]
    with path.open("rb") as file:
        weight_map = json.loads(file.read(LARGEST_INDEX)).get("weight_map", {})
    names = sorted(set(weight_map.values()))
    return [path, *(path.parent / name for name in names[:MOST_FILES])]


def _samples(file: Path) -> Iterator[bytes]:
    if not file.is_file():  # a pipe would wait for ever
        raise ValueError(f"{file} is no regular file")
    size = file.stat().st_size
    yield str(size).encode()
    with file.open("rb") as opened:
        for i in range(BLOCKS):
            opened.seek(max(0, size - BLOCK) * i // (BLOCKS - 1))
            yield opened.read(BLOCK)


def checkpoint_again(name: object, recorded: object, candidates: Sequence[Path]) -> Path:
    """The one of the candidates that a picture was drawn with, by its recorded fingerprint. Raises ProvenanceError."""
    for path in candidates:
        if recorded and fingerprint(path) == recorded:
            return path
    raise ProvenanceError(f"the picture was drawn with the checkpoint {name} ({recorded}); name it with --ckpt")


def _triples(recorded: object, option: str) -> list[tuple[str, str, object]]:
    """What a picture says of files: name, fingerprint and one thing more of each. Raises ProvenanceError."""
    match recorded:
        case None:
            return []
        case list() if all(
            isinstance(one, list) and [*map(type, one[:2]), len(one)] == [str, str, 3] for one in recorded
        ):
            return [tuple(one) for one in recorded]
    raise ProvenanceError(f"what the picture says of {option} is damaged; name its files with {option}")


def loras_again(recorded: object, folder: Path) -> list[str]:
    """The LoRAs that a picture was drawn with, as --lora takes them: in the working directory or the picture's folder.

    Raises ProvenanceError for one that is not there.
    """
    found = []
    for name, digest, weight in _triples(recorded, "--lora"):
        candidates = (Path(name), folder / Path(name).name)
        path = next((path for path in candidates if path.is_file() and fingerprint(path) == digest), None)
        if path is None:
            raise ProvenanceError(f"the picture was drawn with the LoRA {name} ({digest}); name it with --lora")
        found.append(f"{path}:{weight}")
    return found


def embeddings_again(recorded: object, folder: Path) -> list[str]:
    """The same of learned words, as --embedding takes them."""
    found = []
    for name, digest, word in _triples(recorded, "--embedding"):
        path = next(
            (p for p in (Path(name), folder / Path(name).name) if p.is_file() and fingerprint(p) == digest), None
        )
        if path is None:
            raise ProvenanceError(
                f"the picture was drawn with the words of {name} ({digest}); name it with --embedding"
            )
        found.append(f"{path}:{word}" if word else str(path))
    return found


def vae_again(recorded: object, folder: Path) -> Path | None:
    """The autoencoder's file or folder that a picture was drawn with, if it had its own."""
    if not isinstance(recorded, list) or len(recorded) != 2:
        return None
    name, digest = map(str, recorded)
    for path in (Path(name), folder / Path(name).name):
        if path.exists() and fingerprint(path) == digest:
            return path
    raise ProvenanceError(f"the picture was drawn with the autoencoder {name} ({digest}); name it with --vae")


def file_again(option: str, name: str, recorded: object, folder: Path) -> str:
    """The init image or mask of that name, in the working directory or the picture's folder. Raises ProvenanceError."""
    for path in (Path(name), folder / Path(name).name):
        if path.is_file() and fingerprint(path) == recorded:
            return str(path)
    raise ProvenanceError(f"the picture was drawn from {name} ({recorded}); name that file with {option}")

"""The files of a run's pictures: their names, and which are there already."""

import os
import re
import string
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from sd.pictures.parameters import UserError, shown
from sd.pictures.plan import Job, Picture

MAX_NAME = 255
"""Bytes of a file name, on the file systems in use."""


# ---- file names


def output_files(pattern: str, jobs: Sequence[Job], many: bool) -> list[Path]:
    """The file of each job: the pattern with its fields filled in, `out/{index:04}-{seed}.png`.

    many: the run may draw several pictures, so a pattern without a field gets -{index} before .png. Raises UserError
    unless every file can be written where it belongs and no two jobs have the same.
    """
    if many and not _fields(pattern):
        pattern = _numbered(pattern)
    files = [_output_file(pattern, job) for job in jobs]
    for folder in dict.fromkeys(file.parent for file in files):
        _check_folder(folder)
    taken: dict[Path, Job] = {}
    for file, job in zip(files, jobs, strict=True):
        if file in taken:
            raise UserError(f"--out: pictures {taken[file].index} and {job.index} would both be {file}; add {{index}}")
        taken[file] = job
    return files


NAME_FIELDS = ("index", "seed", "prompt", "sampler", "steps", "cfg_scale")


def _fields(pattern: str) -> list[str]:
    """The fields of a pattern. Nothing but plain names is let through: str.format could reach into objects."""
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise UserError(f"--out: {pattern}: {error}") from None
    found = [(field, spec, conversion) for _, field, spec, conversion in parts if field is not None]
    for field, spec, conversion in found:
        if field not in NAME_FIELDS or conversion or "{" in spec:
            there_are = ", ".join(f"{{{name}}}" for name in NAME_FIELDS)
            raise UserError(f"--out: {pattern} has the field {{{field}}}; there are {there_are}")
    return [field for field, _, _ in found]


def _numbered(pattern: str) -> str:
    path = Path(pattern)
    return str(path.with_name(f"{path.stem}-{{index}}{path.suffix}"))


def _output_file(pattern: str, job: Job) -> Path:
    if not _fields(pattern):
        file = Path(pattern.format())
    else:
        values = {name: getattr(job, name) for name in NAME_FIELDS} | {"prompt": slug(job.prompt)}
        try:
            file = Path(pattern.format(**values))
        except (ValueError, OverflowError) as error:
            raise UserError(f"--out: {pattern}: {error}") from None
    if len(os.fsencode(file.name)) > MAX_NAME:
        raise UserError(f"--out: the name {file.name[:20]}... is longer than {MAX_NAME} bytes")
    if file.is_dir():
        raise UserError(f"--out: {file} is a folder; name a .png file")
    if file.suffix.lower() != ".png":
        raise UserError(f"--out: pictures are PNG files, so {file} must end in .png")
    return file


def slug(prompt: str, length: int = 40) -> str:
    """The prompt as part of a file name: lower-case words joined by "-", never empty, at most length characters."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt).lower())
    return "-".join(words)[:length].rstrip("-") or "picture"


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"--out: there is no folder {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # permissions do not tell of a read-only mount or a full disk
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(f"--out: {folder} is not writable ({error.strerror})") from None


# ---- what is there already


def left_to_draw(
    pictures: Iterable[Picture],
    read_parameters: Callable[[Path], Mapping[str, object]],
    same: Mapping[str, object] | None = None,
    ignore: Sequence[str] = (),
) -> list[Picture]:
    """The pictures whose file is not there yet.

    A file that is there must be that very picture by its parameters and those in `same`, those in `ignore` aside: a
    file of another prompt or model is neither overwritten nor taken for it. Raises UserError then.
    """
    left = []
    for job, file in pictures:
        wanted = {name: value for name, value in {**job.parameters(), **(same or {})}.items() if name not in ignore}
        if not file.exists():
            left.append((job, file))
        elif difference := _difference(file, wanted, read_parameters):
            raise UserError(f"{file} is there and is another picture ({difference}); --overwrite, or another --out")
    return left


def _difference(file: Path, wanted: Mapping[str, object], read_parameters: Callable) -> str:
    try:
        there = read_parameters(file)
    except (OSError, ValueError):
        return "not one of this program's"
    differing = (name for name, value in wanted.items() if there.get(name) != value)
    return next((f"its {name} is {shown(there.get(name))}, not {shown(wanted[name])}" for name in differing), "")

"""The files of a run's pictures: their names, and which are there already."""

import os
import re
import string
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sd.nearest import is_it
from sd.pictures.formats import ENDINGS
from sd.pictures.parameters import UserError, shown
from sd.pictures.plan import Job, Picture

MAX_NAME = 255
"""Bytes of a file name, on the file systems in use."""


# ---- file names


DEFAULT = "output.png"
WINDOW = 1000
"""Pictures that are named, checked and grouped at once: so that a million begin as soon as one."""


@dataclass(frozen=True)
class Pictures:
    """The jobs of a run with the file of each: the pattern with its fields filled in, as `out/{index:04}-{seed}.png`.

    after: number that is added to each index. sources: files that pictures are drawn from, over which none is drawn.
    """

    jobs: Sequence[Job]
    pattern: str
    after: int = 0
    sources: frozenset[Path] = frozenset()

    def __len__(self) -> int:
        return len(self.jobs)

    def __iter__(self) -> Iterator[Picture]:
        return (picture for window in self.windows() for picture in window)

    def windows(self) -> Iterator[list[Picture]]:
        """Some at a time. Raises UserError where a file cannot be written, or is a source, or another job's too."""
        taken: dict[Path, int] = {}
        sources = {identity(source) for source in self.sources}
        for start in range(0, len(self.jobs), WINDOW):
            jobs = [self.jobs[place] for place in range(start, min(start + WINDOW, len(self.jobs)))]
            files = _files(self.pattern, jobs, self.after, taken)
            if over := next((file for file in files if sources and identity(file) in sources), None):
                raise UserError(f"--out: {over} is a picture that is drawn from; name another file")
            yield list(zip(jobs, files, strict=True))


def named(jobs: Sequence[Job], out: str | None, many: bool, random: bool) -> Pictures:
    """The pictures with their files. out: a pattern, or None: output.png, or after it names that are not taken.

    many: the run may draw several, so a pattern without a field gets -{index} before its ending. random: they are other
    pictures than those of an earlier run.
    """
    if out is not None:
        return Pictures(jobs, numbered(out) if many else out)
    if many:
        return Pictures(jobs, numbered(DEFAULT), last_number(Path(DEFAULT)) if random else 0)
    return Pictures(jobs, str(free_name(Path(DEFAULT))))


def output_files(pattern: str, jobs: Sequence[Job], many: bool) -> list[Path]:
    """The file of each job. many: the run may draw several pictures, so a pattern without a field gets -{index} before
    its ending. Raises UserError unless every file can be written where it belongs and no two jobs have the same.
    """
    return _files(numbered(pattern) if many else pattern, jobs, 0, {})


def _files(pattern: str, jobs: Sequence[Job], after: int, taken: dict[Path, int]) -> list[Path]:
    files = [_output_file(pattern, job, after) for job in jobs]
    for folder in dict.fromkeys(file.parent for file in files):
        _check_folder(folder)
    for file, job in zip(files, jobs, strict=True):
        if file in taken:
            raise UserError(f"--out: pictures {taken[file]} and {job.index} would both be {file}; add {{index}}")
        taken[file] = job.index
    return files


def identity(path: Path) -> object:
    """Of two paths to one file the same, links too."""
    try:
        found = path.stat()
    except OSError:
        return path.absolute()
    return found.st_dev, found.st_ino


def free_name(path: Path) -> Path:
    """The path, or beside it the first of output-1.png, output-2.png, ... after all that are there."""
    return path if not os.path.lexists(path) else path.with_name(f"{path.stem}-{last_number(path) + 1}{path.suffix}")


def last_number(path: Path) -> int:
    """The largest number in names as output-12.png beside output.png; 0 where there is none."""
    name = re.compile(re.escape(path.stem) + r"-(\d{1,18})" + re.escape(path.suffix))
    found = (name.fullmatch(file) for file in (os.listdir(path.parent) if path.parent.is_dir() else ()))
    return max((int(match[1]) for match in found if match), default=0)


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
            listed = ", ".join(f"{{{name}}}" for name in NAME_FIELDS)
            near = is_it(field, NAME_FIELDS) or ";"
            raise UserError(f"--out: {pattern} has the field {{{field}}}{near} there are {listed}")
    return [field for field, _, _ in found]


def numbered(pattern: str) -> str:
    """The pattern, with -{index} before its ending if it has no field. Raises UserError for fields that are none."""
    if _fields(pattern):
        return pattern
    path = Path(pattern)
    return str(path.with_name(f"{path.stem}-{{index}}{path.suffix}"))


def _output_file(pattern: str, job: Job, after: int = 0) -> Path:
    if not _fields(pattern):
        file = Path(pattern.format())
    else:
        values = {name: getattr(job, name) for name in NAME_FIELDS}
        values |= {"prompt": slug(job.prompt), "index": job.index + after}
        try:
            file = Path(pattern.format(**values))
        except (ValueError, OverflowError) as error:
            raise UserError(f"--out: {pattern}: {error}") from None
    if len(os.fsencode(file.name)) > MAX_NAME:
        raise UserError(f"--out: the name {file.name[:20]}... is longer than {MAX_NAME} bytes")
    if file.is_dir():
        raise UserError(f"--out: {file} is a folder; name a file in it")
    if file.suffix.lower() not in ENDINGS:
        raise UserError(f"--out: {file} must end in one of {', '.join(ENDINGS)}")
    return file


def slug(prompt: str, length: int = 40) -> str:
    """The prompt as part of a file name: lower-case words joined by "-", never empty, at most length characters."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt).lower())
    return "-".join(words)[:length].rstrip("-") or "picture"


def _check_folder(folder: Path) -> None:
    """That it is there, or can be made once there is a picture, and can be written to."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"--out: {folder} is no folder")
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

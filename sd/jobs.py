"""Which pictures to draw: prompt files, parameters, file names, what is there already, and batches.

Nothing here draws or knows a model, and torch is not imported: a mistake in line 900 of a prompts file is told at once.
"""

import argparse
import json
import math
import os
import re
import string
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

SAMPLERS = ("ddpm", "ddim")
DEFAULTS: dict[str, object] = {
    "negative_prompt": "",
    "steps": 50,
    "cfg_scale": 7.5,
    "height": None,
    "width": None,
    "sampler": "ddpm",
    "init_image": None,
    "strength": 0.8,
}
MAX_NAME = 255
"""Bytes of a file name, on the file systems in use."""

Drawn = TypeVar("Drawn")


class UserError(Exception):
    """Something that the person at the keyboard can put right: printed in one line, exit code 2."""


class OneLineParser(argparse.ArgumentParser):
    """Raises UserError for a wrong option, in place of printing the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists all options)")


# ---- parameters


def check_parameter(name: str, value: object) -> object:
    """The value, as the type that this parameter has. Raises ValueError, naming the parameter and what it takes."""
    if name not in CHECKS:
        raise ValueError(f"there is no parameter {name!r}; there are {', '.join(CHECKS)}")
    return CHECKS[name](name, value)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds characters that are not Unicode text") from None
    return value


def _whole(low: int, high: int, high_text: str = "") -> Callable[[str, object], int]:
    def check(name: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high_text or high}, not {_shown(value)}")
        return value

    return check


def _number(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {_shown(value)}")
    return float(value)


def _strength(name: str, value: object) -> float:
    if not 0 < _number(name, value) <= 1:
        raise ValueError(f"{name} must be over 0 and at most 1, not {_shown(value)}")
    return float(value)


def _sampler(name: str, value: object) -> str:
    if value not in SAMPLERS:
        raise ValueError(f"no {name} {_shown(value)}; there are {', '.join(SAMPLERS)}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


CHECKS: dict[str, Callable[[str, object], object]] = {
    "prompt": _text,
    "negative_prompt": _text,
    "steps": _whole(1, 1000),
    "cfg_scale": _number,
    "seed": _whole(0, 2**63 - 1, "2**63 - 1"),
    "height": _whole(1, 2**16),
    "width": _whole(1, 2**16),
    "sampler": _sampler,
    "init_image": _text,
    "strength": _strength,
    "num_images": _whole(1, 10**6),
}
"""The parameters of a picture, by the names that prompt files and pictures carry, and how each is checked."""


# ---- prompt files


class Entry(NamedTuple):
    """Own parameters of some pictures, and where they come from, to say in errors ("" for the command line)."""

    where: str
    parameters: Mapping[str, object]


def read_prompts(path: str | os.PathLike) -> list[Entry]:
    """The prompts of a UTF-8 text file, one a line, or of a .jsonl file, one object of parameters a line.

    Empty lines are skipped. Raises UserError, naming the file and the line, for anything that cannot be read.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts-file: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"--prompts-file: {path} cannot be read ({error.strerror or error})") from None
    read = _json_line if path.suffix.lower() in (".jsonl", ".ndjson") else _text_line
    numbered = [(f"{path} line {number}", line.strip()) for number, line in enumerate(lines, start=1)]
    entries = [Entry(where, read(where, line)) for where, line in numbered if line]
    if not entries:
        raise UserError(f"--prompts-file: {path} holds no prompt")
    return entries


def _text_line(where: str, line: str) -> dict[str, object]:
    return {"prompt": line}


def _json_line(where: str, line: str) -> dict[str, object]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f'{where}: not an object such as {{"prompt": "a fox", "steps": 30}}')
    if not isinstance(values.get("prompt"), str):
        raise UserError(f'{where}: it lacks "prompt"')
    return checked(where, values)


def checked(where: str, values: Mapping[str, object]) -> dict[str, object]:
    """The parameters, checked; None means not given. Raises UserError that starts with where."""
    try:
        return {name: check_parameter(name, value) for name, value in values.items() if value is not None}
    except ValueError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


# ---- the plan


@dataclass(frozen=True)
class Job:
    """One picture to draw. index counts from 1 over the whole run; height and width None are the model's own."""

    index: int
    where: str
    prompt: str
    seed: int
    negative_prompt: str
    steps: int
    cfg_scale: float
    height: int | None
    width: int | None
    sampler: str
    init_image: str | None
    strength: float

    def settings(self) -> tuple:
        """What pictures drawn in one batch must have in common."""
        return self.steps, self.cfg_scale, self.height, self.width, self.sampler, self.init_image, self.strength

    def parameters(self) -> dict[str, object]:
        """What its PNG will say of it, as far as it is known before drawing."""
        names = ["prompt", "negative_prompt", "seed", "steps", "cfg_scale", "sampler", "height", "width"]
        names += ["init_image", "strength"] if self.init_image else []
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


Picture = tuple[Job, Path]
"""What to draw and the file it goes to."""


def plan(entries: Iterable[Entry], shared: Mapping[str, object], first_seed: int) -> list[Job]:
    """The pictures that the entries ask for, in order: num_images of each.

    An entry's own parameters win over the shared ones, which win over DEFAULTS. An entry's own seed counts up over its
    pictures; the others' seeds are first_seed, first_seed + 1, ... over the whole run. Raises UserError.
    """
    jobs: list[Job] = []
    for where, own in entries:
        values = {**DEFAULTS, **shared, **own}
        count = values.pop("num_images", 1)
        for i in range(count):
            seed = own["seed"] + i if "seed" in own else first_seed + len(jobs)
            checked(where, {"seed": seed})
            jobs.append(Job(**{**values, "seed": seed, "index": len(jobs) + 1, "where": where}))
    return jobs


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
    return next((f"its {name} is {_shown(there.get(name))}, not {_shown(wanted[name])}" for name in differing), "")


# ---- batches


def groups(pictures: Iterable[Picture]) -> list[list[Picture]]:
    """Pictures that can share a batch, together: in the order of the first of each group."""
    found: dict[tuple, list[Picture]] = {}
    for job, file in pictures:
        found.setdefault(job.settings(), []).append((job, file))
    return list(found.values())


def draw_in_batches(
    jobs: Sequence[Job],
    draw: Callable[[Sequence[Job]], Sequence[Drawn]],
    size: int,
    is_out_of_memory: Callable[[BaseException], bool],
    make_room: Callable[[int], None],
) -> Iterator[tuple[list[Job], Sequence[Drawn]]]:
    """Draw jobs of one group, `size` at a time; yields each batch with its pictures, which nothing here keeps.

    A batch that runs out of memory is drawn again in halves, and so are the rest: make_room(new size) is called first.
    Raises what draw raised if a single picture does not fit.
    """
    rest = list(jobs)
    while rest:
        batch = rest[:size]
        try:
            drawn = draw(batch)
        except Exception as error:
            if size == 1 or len(batch) == 1 or not is_out_of_memory(error):
                raise
            drawn = None
        if drawn is None:  # out here, where the error no longer holds the failed batch's tensors
            size = len(batch) // 2
            make_room(size)
            continue
        yield batch, drawn
        del drawn
        rest = rest[len(batch) :]

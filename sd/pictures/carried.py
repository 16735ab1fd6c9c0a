"""Pictures that are drawn on another machine, after files of this one: which these are, and their names there.

There they lie in a folder that stands for the working directory, so that a picture says the name that somebody typed,
and --from-png finds the file here. Neither torch nor Pillow is needed: what is in a file, the other machine reads.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sd.pictures.controls import OPTION, Named, read_control
from sd.pictures.parameters import UserError, recorded
from sd.pictures.plan import Job, Plan
from sd.pictures.provenance import fingerprint


@dataclass(frozen=True)
class Carried:
    """plan: as the other machine draws it. files: what it names, by the names that they have there."""

    plan: Plan
    files: Mapping[str, Path]


def carried(plan: Plan) -> Carried:
    """Raises UserError for a file that is not here, and for a --control that says none."""
    found = [(job, option, path) for job in plan.firsts for option, path in _named(job)]
    for job, option, path in found:
        if not path.is_file():
            raise UserError(f"{job.where or option}: there is no file {path}")
    names = _names(path for _, _, path in found)
    firsts = tuple(replace(job, values=_renamed(job, names)) for job in plan.firsts)
    return Carried(replace(plan, firsts=firsts), {name: path for path, name in names.items()})


def named_by(job: Job) -> set[str]:
    """The files that a job needs, by the names that it has for them."""
    return {path.as_posix() for _, path in _named(job)}


def _named(job: Job) -> Iterator[tuple[str, Path]]:
    """Each file and the option that names it. Raises UserError."""
    for one in recorded():
        if one.file and job.values[one.name]:
            yield one.option, Path(job.values[one.name])
    for text in job.control or ():
        try:
            control = read_control(text)
        except ValueError as error:
            raise UserError(f"{job.where or OPTION}: {error}") from None
        yield OPTION, control.net
        yield OPTION, control.picture


def _names(paths: Iterable[Path]) -> dict[Path, str]:
    """What was typed, where that is a name below the working directory; else the last part of it. Of two files that
    would be of one name, the second lies in a folder that is called by its content. No colons, which --control has."""
    names: dict[Path, str] = {}
    for path in paths:
        below = not path.is_absolute() and ".." not in path.parts
        name, last = (text.replace(":", "_") for text in (path.as_posix() if below else path.name, path.name))
        if path not in names:
            names[path] = f"{fingerprint(path)}/{last}" if name in names.values() else name
    return names


def _renamed(job: Job, names: Mapping[Path, str]) -> dict[str, object]:
    """The job's parameters, with these names for its files."""
    files = {one.name: job.values[one.name] for one in recorded() if one.file and job.values[one.name]}
    changed: dict[str, object] = {name: names[Path(file)] for name, file in files.items()}
    if job.control:
        changed["control"] = tuple(_control(read_control(text), names) for text in job.control)
    return {**job.values, **changed}


def _control(named: Named, names: Mapping[Path, str]) -> str:
    return replace(named, net=Path(names[named.net]), picture=Path(names[named.picture])).text()

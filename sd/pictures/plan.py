"""Which pictures to draw: prompts files, the jobs that they ask for, and which of these share a batch.

Nothing here draws or knows a model, and torch is not imported: a mistake in line 900 of a prompts file is told at once.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from sd.pictures.parameters import PARAMETERS, UserError, check_together, checked, defaults, recorded

Drawn = TypeVar("Drawn")


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


# ---- the plan


@dataclass(frozen=True)
class Job:
    """One picture to draw. `job.steps` and so on are its recorded parameters; where is what errors name ("": nothing).

    index counts from 1 over the whole run; height and width None are the model's own.
    """

    index: int
    where: str
    values: Mapping[str, object] = field(hash=False)

    def __getattr__(self, name: str) -> object:
        if name not in PARAMETERS or name not in self.values:
            raise AttributeError(f"a job has no {name!r}")
        return self.values[name]

    def settings(self) -> tuple:
        """What pictures drawn in one batch must have in common."""
        return tuple(self.values[one.name] for one in recorded() if not one.own)

    def parameters(self) -> dict[str, object]:
        """What its PNG will say of it, as far as it is known before drawing."""
        said = (one.name for one in recorded() if one.beside is None or self.values[one.beside] is not None)
        given = {name: self.values[name] for name in said if self.values[name] is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}  # as JSON


Picture = tuple[Job, Path]
"""What to draw and the file it goes to."""


def plan(entries: Iterable[Entry], shared: Mapping[str, object], first_seed: int) -> list[Job]:
    """The pictures that the entries ask for, in order: num_images of each.

    An entry's own parameters win over the shared ones, which win over the defaults. An entry's own seed counts up over
    its pictures; the others' seeds are first_seed, first_seed + 1, ... over the whole run. Raises UserError.
    """
    jobs: list[Job] = []
    for where, own in entries:
        values = {**defaults(), **shared, **own}
        check_together(where, values)
        count = values["num_images"]
        for i in range(count):
            seed = own["seed"] + i if "seed" in own else first_seed + len(jobs)
            checked(where, {"seed": seed})
            own_values = {one.name: values[one.name] for one in recorded()} | {"seed": seed}
            jobs.append(Job(len(jobs) + 1, where, own_values))
    return jobs


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

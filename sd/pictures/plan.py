"""Which pictures to draw: the jobs that are asked for, and which of them share a batch.

Nothing here draws or knows a model, and torch is not imported: a mistake in line 900 of a prompts file is told at once.
"""

from bisect import bisect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from sd.pictures.parameters import PARAMETERS, check_together, checked, defaults, recorded
from sd.pictures.prompts_file import Entry

Drawn = TypeVar("Drawn")


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
        """What pictures drawn in one batch must have in common; of files, that they are given."""
        shared = (one for one in recorded() if not one.own)
        return tuple(self.values[one.name] is None if one.file else self.values[one.name] for one in shared)

    def parameters(self) -> dict[str, object]:
        """What its PNG will say of it, as far as it is known before drawing."""
        said = (one.name for one in recorded() if one.says_something(self.values))
        given = {name: self.values[name] for name in said if self.values[name] is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}  # as JSON


Picture = tuple[Job, Path]
"""What to draw and the file it goes to."""


@dataclass(frozen=True)
class Plan(Sequence[Job]):
    """The jobs of a run, each made when it is asked for: there may be millions. firsts: the first one of each entry."""

    firsts: tuple[Job, ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, place: int | slice) -> Job | list[Job]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        first = self.firsts[bisect(self.ends, place)]
        more = place + 1 - first.index
        return replace(first, index=place + 1, values={**first.values, "seed": first.seed + more})


def plan(entries: Iterable[Entry], shared: Mapping[str, object], first_seed: int) -> Plan:
    """The pictures that the entries ask for, in order: num_images of each.

    An entry's own parameters win over the shared ones, which win over the defaults. An entry's own seed counts up over
    its pictures; the others' seeds are first_seed, first_seed + 1, ... over the whole run. Raises UserError.
    """
    firsts: list[Job] = []
    ends: list[int] = []
    done = 0
    for where, own in entries:
        values = {**defaults(), **shared, **own}
        check_together(where, values)
        seed, count = own.get("seed", first_seed + done), values["num_images"]
        checked(where, {"seed": seed + count - 1})
        own_values = {one.name: values[one.name] for one in recorded()} | {"seed": seed}
        firsts.append(Job(done + 1, where, own_values))
        done += count
        ends.append(done)
    return Plan(tuple(firsts), tuple(ends))


# ---- batches


def groups(pictures: Iterable[Picture], alike: Callable[[Job], Hashable] = Job.settings) -> list[list[Picture]]:
    """Pictures that can share a batch, as `alike` says, together: in the order of the first of each group."""
    found: dict[Hashable, list[Picture]] = {}
    for job, file in pictures:
        found.setdefault(alike(job), []).append((job, file))
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

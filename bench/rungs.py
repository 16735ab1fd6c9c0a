"""The rows of a ladder and what is held constant over them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sd import optimizations

KNOBS = ("steps", "sampler", "sampling")


@dataclass(frozen=True)
class Row:
    """One rung: its name in the table, and everything that is on.

    `names` are optimizations of sd.optimizations and the ladder's own knobs, `steps=N`, `sampler=NAME` and
    `sampling=NAME:SCHEDULE:STEPS`, which says all three.
    """

    label: str
    names: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return ",".join(self.names) or "none"

    @property
    def optimizations(self) -> list[str]:
        return [name for name in self.names if _family(name) not in KNOBS]

    def sampling(self, steps: int, sampler: str) -> dict[str, str | int | None]:
        """What `generate` is given: of its knobs, else these."""
        given = {_family(name): name.partition("=")[2] for name in self.names if _family(name) in KNOBS}
        if "sampling" in given:
            sampler, schedule, steps = given["sampling"].split(":")
            return {"sampler": sampler, "schedule": schedule, "steps": int(steps)}
        return {"sampler": given.get("sampler", sampler), "schedule": None, "steps": int(given.get("steps", steps))}

    @property
    def exact(self) -> bool:
        entries = [optimizations.catalog().get(_family(name)) for name in self.names]
        return all(entry is not None and entry.exact for entry in entries)


NAIVE = Row("naive", ("naive",))
PLAIN = Row("sdpa")
RERUN = Row("plain, drawn again", ("rerun",))


@dataclass(frozen=True)
class Settings:
    """What is held constant over the rows of one table."""

    device: torch.device
    dtype: torch.dtype
    weights: str
    size: int
    steps: int
    batch: int
    sampler: str
    pairs: int
    trained: str | None
    fidelity_steps: int

    def speed_columns(self) -> dict[str, str | int]:
        weights = Path(self.weights).name
        return {
            "weights": weights,
            "size": self.size,
            "steps": self.steps,
            "batch": self.batch,
            "sampler": self.sampler,
        }

    def fidelity_columns(self) -> dict[str, str | int]:
        trained = Path(self.trained or "").name
        return {"trained": trained, "fidelity_steps": self.fidelity_steps, "sampler": self.sampler}


def rows_of(base: Sequence[str], names: Sequence[str], mode: str) -> list[Row]:
    """The rungs of a ladder, from row 0 on. `base` is on in every row after row 1."""
    base = tuple(base)
    rows = [NAIVE, PLAIN]
    if base:
        rows.append(Row("base", base))
    if mode == "cumulative":
        rows += [Row(f"+ {name}", (*base, *names[: i + 1])) for i, name in enumerate(names)]
    elif mode == "alone":
        rows += [Row(f"+ {name}", (*base, name)) for name in names]
    else:
        rows.append(Row("all", (*base, *names)))
        rows += [Row(f"- {name}", (*base, *(n for n in names if n != name))) for name in names]
    return rows


NOT_OF_A_PRESET = ("page-out",)
"""What cannot run here, and a preset leaves out: all rows share one set of weights in memory, which no file has."""


@dataclass(frozen=True)
class Machine:
    """All that a preset wants to know of a pipeline, before there is one."""

    device: torch.device
    dtype: torch.dtype = torch.float32


def parse_names(text: str, device: torch.device) -> list[str]:
    """Optimizations, presets and knobs, in the order given. Raises OptimizationError."""
    names: list[str] = []
    for word in (word.strip() for word in text.split(",")):
        if _family(word) in KNOBS:
            names.append(word)
        else:
            choices = optimizations.parse(word, Machine(device))
            names += [choice.text for choice in choices if not (choice.preset and choice.name in NOT_OF_A_PRESET)]
    return names


def _family(name: str) -> str:
    return name.partition("=")[0]

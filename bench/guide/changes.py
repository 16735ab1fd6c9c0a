"""What `explain` says before and after an optimization, shortened to what differs."""

import re
from collections.abc import Iterable, Mapping, Sequence

from bench.guide import work
from sd.optimizations.explain import Row
from sd.optimizations.registry import catalog
from sd.pipeline import StableDiffusion

MOST = 12
BY_THE_DEMO_MODEL = ("cpu-int8", "float8", "int8-dynamic", "int8-static", "int8-weights", "attention")
BLOCKS = re.compile(r"\b(input_blocks\.\*\.\*|middle_block\.\*|output_blocks\.\*\.\*)")


def needs_a_machine(name: str) -> bool:
    """Whether what it says depends on a device, a compiler or weights, so that it is recorded with the pictures."""
    return name in BY_THE_DEMO_MODEL or name in ("page-out", "winograd") or "C++" in catalog()[name].needs.text


def on_shapes(name: str) -> list[Row]:
    """What an optimization changes on SD 1.5's shapes, as this machine would run it."""
    return work.explained(work.plain(), name)[1]


def of(pipe: StableDiffusion, name: str, text: str, recorded: Mapping) -> tuple[list[Row], list[Row]]:
    """(before, after) of one optimization, modules alike in a row, both of one model. pipe: SD 1.5 without weights."""
    if name in BY_THE_DEMO_MODEL:
        pipe = work.demo(recorded.get(name, {}).get("dtype", "float32"))
    before = list(work.explain(pipe).rows)
    if needs_a_machine(name):
        after = [
            Row(**{**row, "switches": tuple(row["switches"])}) for row in recorded.get(name, {}).get("explain", ())
        ]
    else:
        after = [row for row in work.explained(pipe, text)[1] if name in row.switches]
    after = merged(row for row in after if name in row.switches)
    touched = {row.module for row in after}
    return [row for row in merged(before) if row.module in touched], after


def merged(rows: Iterable[Row]) -> list[Row]:
    """The way down, the middle and the way up in one; what is left is a row for each kernel."""
    counts: dict[tuple, int] = {}
    for row in rows:
        key = (BLOCKS.sub("(blocks)", row.module), row.kernel, row.dtype, row.switches)
        counts[key] = counts.get(key, 0) + row.count
    return [Row(module, count, *rest) for (module, *rest), count in counts.items()]


def table(rows: Sequence[Row]) -> str:
    cells = [(row.module, f"x{row.count}" if row.count > 1 else "", row.kernel, row.dtype) for row in rows[:MOST]]
    if not cells:
        return "(nothing of its own: the modules stay as they are)"
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    left = len(rows) - MOST
    return "\n".join(lines + ([f"... and {left} more rows"] if left > 0 else []))

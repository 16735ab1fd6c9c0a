"""What runs in each module of a pipeline, and which switch put it there."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from sd.attention import attention, naive_attention
from sd.kernels import native
from sd.optimizations.base import SEAMS, Record, record_of
from sd.optimizations.beside import Beside
from sd.pipeline import StableDiffusion

PLAIN = "PyTorch"
NOTABLE = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Row:
    """module: its name, with * for numbers that do not matter. count: how many modules the row stands for.

    kernel: what computes there. dtype: of its weights. switches: those that had a part in it, in their order.
    """

    module: str
    count: int
    kernel: str
    dtype: str
    switches: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """The rows; print it for a table. instruction_set: what the C++ kernels are built for, if any of them runs."""

    rows: tuple[Row, ...]
    instruction_set: str = ""

    def __str__(self) -> str:
        head = ("WHERE", "", "WHAT RUNS", "DTYPE", "SWITCH")
        cells = [
            (row.module, f"x{row.count}" if row.count > 1 else "", row.kernel, row.dtype, ", ".join(row.switches))
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (head, *cells)]
        told = [f"C++: built for {self.instruction_set}"] if self.instruction_set else []
        return "\n".join(lines + told)

    __repr__ = __str__


def explain(pipe: StableDiffusion) -> Explanation:
    """What runs in each layer, attention and swapped block; modules alike but for their number share a row."""
    record = record_of(pipe) or Record(pipe)
    beside = [record_of(net) or Beside(pipe, net) for net in pipe.controlnets.loaded.values()]
    counts: dict[tuple, int] = {}
    for row in (row for each in (record, *beside) for row in _rows(each)):
        counts[row] = counts.get(row, 0) + 1
    alike = tuple(Row(module, count, *rest) for (module, *rest), count in counts.items())
    rows = (*_seams(record), *alike)
    in_cpp = any("C++" in row.kernel for row in rows) and native.load() is not None
    return Explanation(rows, native.instruction_set() if in_cpp else "")


def _seams(record: Record) -> Iterator[Row]:
    """The calls of the pipeline that are wrapped, the outermost switch first."""
    for seam, (owner, method) in SEAMS.items():
        switches = tuple(patch.name for patch in reversed(record.patches) if seam in patch.seams)
        if switches:
            yield Row(f"{owner}.{method}()", 1, "wrapped", "", switches)


def _rows(record: Record) -> Iterator[tuple]:
    for part, model in record.parts().items():
        for name, module in model.named_modules(prefix=part):
            switches = _switches(record, part, name.removeprefix(f"{part}."), module)
            kernel = _kernel(record, module)
            if kernel:
                yield re.sub(r"(\.|norm|conv|block_)\d+\b", r"\1*", name), kernel, _dtype(module), switches


def _switches(record: Record, part: str, name: str, module: nn.Module) -> tuple[str, ...]:
    weights = {f"{name}.{own}" for own in module._parameters}
    return tuple(
        patch.name
        for patch in record.patches
        if id(module) in patch.before
        or id(module) in patch.swapped
        or id(module) in patch.labels
        or id(module) in patch.notes
        or any(one.part == part and weights.intersection(one.names) for one in patch.converted)
    )


def _kernel(record: Record, module: nn.Module) -> str:
    """What computes in a module, or "" for one that only calls others."""
    labels = [patch.labels[id(module)] for patch in record.patches if id(module) in patch.labels]
    notes = [patch.notes[id(module)] for patch in record.patches if id(module) in patch.notes]
    own = getattr(module, "kernel", "")
    if hasattr(module, "attend"):
        kernel = ", ".join(filter(None, (own, f"attention: {(labels or [_plain_backend(module)])[-1]}")))
    elif labels or own:
        kernel = [own, *labels][-1]
    elif "forward" in vars(module):
        kernel = f"{PLAIN}, wrapped" if isinstance(module, NOTABLE) else "wrapped"
    elif isinstance(module, NOTABLE) or any(id(module) in patch.before for patch in record.patches):
        kernel = PLAIN
    else:
        return ""
    return ", ".join([kernel, *notes])


def _plain_backend(module: nn.Module) -> str:
    return {attention: "SDPA, as PyTorch picks", naive_attention: "naive"}.get(module.attend, "another")


def _dtype(module: nn.Module) -> str:
    weight = next(iter(module.parameters()), None)
    if weight is None:
        return ""
    name = str(weight.dtype).removeprefix("torch.")
    return name if type(weight) in (Tensor, nn.Parameter) else f"{type(weight).__name__} for {name}"

"""Stand-in over sd/optimize.py with the interface of the room to come."""

import torch

from sd import optimize
from sd.optimize import OptimizationError

__all__ = ["OptimizationError", "apply", "check", "default", "listing", "undo"]

LARGE = 300_000_000
OTHERWISE = 4.6


def check(names):
    """Raise OptimizationError for an unknown name or value; needs no pipeline."""
    optimize.parse(names, "cpu")


def default(pipe, memory_budget=None):
    """What suits the pipeline and the machine, as a string for `apply`; "" for the plain pipeline."""
    exact = pipe.device.type == "cpu" and pipe.dtype == torch.float32 and not getattr(pipe.unet, "quantization", None)
    large = sum(weight.numel() for weight in pipe.unet.parameters()) >= LARGE
    names = ["cpu"] if exact and large else []
    return ",".join([*names, *([within(memory_budget)] if memory_budget is not None else [])])


def within(memory_budget):
    """The optimizations that keep SD 1.5 at 512x512 within "low" or gigabytes."""
    try:
        gigabytes = 5.0 if memory_budget == "low" else float(memory_budget)
    except ValueError:
        gigabytes = 0.0
    if not 4.5 <= gigabytes < 1000:
        raise OptimizationError(f"the memory budget must be low, or gigabytes from 4.5 on, not {memory_budget}")
    return f"winograd={max(0.0, gigabytes - OTHERWISE):.2f},page-out"


def apply(pipe, names="default", memory_budget=None):
    """Apply; names is a string or several names, "default" what `default` says. -> what was applied, in order."""
    names = names if isinstance(names, str) else ",".join(names)
    budget = [within(memory_budget)] if memory_budget is not None else []
    words = [default(pipe) if word.strip() == "default" else word for word in names.split(",")]
    chosen = optimize.parse(",".join(filter(None, [*words, *budget])), pipe.device)
    return optimize.apply(pipe, chosen) if chosen else []


def undo(pipe):
    raise NotImplementedError


def listing():
    """The table of --list-opts."""
    from sd.optimize import PRESETS, REGISTRY

    rows = [("NAME", "", "NEEDS", "GAIN", "WHAT IT DOES")]
    for o in REGISTRY.values():
        name = f"{o.name}={o.hint}" if o.hint else o.name
        rows.append((name, "exact" if o.exact else "approximate", o.needs, o.gain, o.summary))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", f"presets: {', '.join(PRESETS)}"])

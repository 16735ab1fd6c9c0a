"""Everything that makes Stable Diffusion faster or smaller, each a switch that can be taken back.

    from sd import optimizations

    optimizations.apply(pipe)                        # what suits the pipeline and the machine
    optimizations.apply(pipe, "exact,deepcache=3")   # or what is named
    print(pipe.explain())                            # what runs where now, and which switch put it there
    optimizations.undo(pipe)                         # the plain pipeline again

`base.py` says what an optimization is; every other file here is one, or a family of them.
"""

from sd.optimizations.base import OptimizationError
from sd.optimizations.explain import Explanation, explain
from sd.optimizations.listing import listing
from sd.optimizations.registry import PRESETS, apply, catalog, check, default, parse, undo, weights_changed

__all__ = [
    "PRESETS",
    "Explanation",
    "OptimizationError",
    "apply",
    "catalog",
    "check",
    "default",
    "explain",
    "listing",
    "parse",
    "undo",
    "weights_changed",
]

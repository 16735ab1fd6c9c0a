"""What the compiler did behind a benchmark's back: graph breaks, recompilations, CUDA graphs captured and skipped."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Counts:
    """Totals since `reset`. `graphs` is how many were compiled, `captures` how many CUDA graphs were recorded."""

    graph_breaks: int = 0
    graphs: int = 0
    skipped: int = 0
    captures: int = 0


class Watch:
    """Counts from a known zero. Reads torch.compile's own counters if it was ever used, and loads nothing if not."""

    def __init__(self) -> None:
        self.captures = 0
        if dynamo := sys.modules.get("torch._dynamo"):
            dynamo.reset()
            dynamo.utils.counters.clear()

    def counts(self) -> Counts:
        utils = sys.modules.get("torch._dynamo.utils")
        if utils is None:
            return Counts(captures=self.captures)
        counters = utils.counters
        return Counts(
            graph_breaks=sum(counters["graph_break"].values()),
            graphs=counters["stats"]["unique_graphs"],
            skipped=counters["inductor"]["cudagraph_skips"],
            captures=self.captures,
        )

    @contextlib.contextmanager
    def capturing(self) -> Iterator["Watch"]:
        """Within this, every CUDA graph that is recorded counts, whoever records it."""
        begin = torch.cuda.CUDAGraph.capture_begin

        def counted(graph, *args, **kwargs):
            self.captures += 1
            return begin(graph, *args, **kwargs)

        torch.cuda.CUDAGraph.capture_begin = counted
        try:
            yield self
        finally:
            torch.cuda.CUDAGraph.capture_begin = begin

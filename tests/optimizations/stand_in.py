"""A stand-in for CUDA graphs on a CPU: what a capture computes is recorded, and replayed into the same memory.

So `cuda-graph` and `loop-graph` run as they are written. A replay runs no Python of theirs, only the recorded
operations on the tensors that they were recorded with: a prompt, weight or phase that a graph does not notice, it does
not notice here. What it does not show is memory that a graph reads after it was freed, streams, and kernels that
PyTorch's dispatcher does not see.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sd.optimizations import base, registry

WAITS = ("_local_scalar_dense", "nonzero", "lift_fresh")
DRAWS = ("randn", "rand", "randint", "normal_", "uniform_", "bernoulli_", "bernoulli", "random_", "multinomial")
NOT_IN_A_CAPTURE = (*WAITS, *DRAWS)
"""What waits for the device or copies from the host, at which a capture fails; and what draws on the host, which is
frozen."""


@dataclass
class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    operations: list[tuple] = field(default_factory=list)
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        with torch.inference_mode():
            for function, args, kwargs, output in self.operations:
                again = function(*args, **kwargs)
                for kept, value in zip(tree_leaves(output), tree_leaves(again), strict=True):
                    # A view of the same memory, or an operation in place, has nothing to copy.
                    if isinstance(kept, Tensor) and kept.data_ptr() != value.data_ptr():
                        kept.copy_(value)


class Capture(TorchDispatchMode):
    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function.overloadpacket.__name__
        if name in NOT_IN_A_CAPTURE:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        output = function(*args, **(kwargs or {}))
        self.graph.operations.append((function, args, kwargs or {}, output))
        return output


class Stream:
    def wait_stream(self, stream: "Stream") -> None:
        assert isinstance(stream, Stream)


class Graphs:
    """The graphs that were captured, in order."""

    def __init__(self) -> None:
        self.captured: list[Graph] = []

    @contextlib.contextmanager
    def capture(self, graph: Graph, pool: Any = None) -> Iterator[None]:
        with Capture(graph):
            yield
        self.captured.append(graph)

    @property
    def replays(self) -> int:
        return sum(graph.replays for graph in self.captured)


def install(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Put the stand-in in torch.cuda's place, and let what needs an NVIDIA GPU be applied here."""
    graphs = Graphs()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graphs.capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    anywhere = {
        name: replace(one, needs=base.ANYTHING) if one.needs is base.NVIDIA else one
        for name, one in registry.catalog().items()
    }
    monkeypatch.setattr(registry, "catalog", lambda: MappingProxyType(anywhere))
    return graphs

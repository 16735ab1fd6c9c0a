"""Another build of the C++ kernels beside the one here, on the shapes of a step: did a change pay?

    mkdir other; git archive COMMIT sd/kernels/cpp | tar -x -C other
    python bench/cpu_builds.py other/sd/kernels/cpp

    python bench/cpu_builds.py --other-set avx2     the same sources for another instruction set of this CPU

Both builds run in one process, taking turns. GFLOP/s are those of the direct algorithm.
"""

import argparse
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common
from bench.common import Spread
from sd.kernels import native
from sd.kernels.allocator import freed_memory_kept
from sd.optimizations import winograd

Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A call of a kernel, made once for each build, and the operations of the direct algorithm."""

    label: str
    flops: int
    make: Callable[[], Run]


def linear(rows: int, k: int, n: int) -> Case:
    x, weight, bias = torch.randn(rows, k), torch.randn(n, k), torch.randn(n)
    return Case(f"linear {rows} x {k} to {n}", 2 * rows * k * n, lambda: lambda: native.linear(x, weight, bias))


def geglu(rows: int, k: int, n: int) -> Case:
    x, weight, bias = torch.randn(rows, k), torch.randn(2 * n, k) / k**0.5, torch.randn(2 * n)
    return Case(f"GEGLU {rows} x {k} to {n}", 4 * rows * k * n, lambda: lambda: native.geglu(x, weight, bias))


def attention(queries: int, keys: int, size: int, heads: int = 8, batch: int = 2) -> Case:
    q, k, v = (torch.randn(batch, length, heads, size).transpose(1, 2) for length in (queries, keys, keys))
    flops = 4 * batch * heads * queries * keys * size
    return Case(f"attention {queries} x {keys}, heads of {size}", flops, lambda: lambda: native.attention(q, k, v))


def convolution(m: int, side: int, c_in: int, c_out: int, batch: int = 2) -> Case:
    x = torch.randn(batch, c_in, side, side).contiguous(memory_format=torch.channels_last)
    weight, g = torch.randn(c_out, c_in, 3, 3), winograd.matrices(m, torch.float64)[1]

    def make() -> Run:
        kernel = native.winograd_kernel(weight, g, upsampled=False)  # in the build's own layout
        return lambda: native.winograd(x, kernel, c_out, m=m)

    return Case(f"F({m}x{m}) {c_in} to {c_out} at {side}x{side}", 18 * batch * side * side * c_in * c_out, make)


def group_norm(channels: int, side: int, batch: int = 2) -> Case:
    x = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
    gain, shift = torch.randn(channels), torch.randn(channels)
    run = lambda: native.group_norm(x, 32, gain, shift, 1e-5, silu=True)  # noqa: E731
    return Case(f"GroupNorm + SiLU of {channels} at {side}x{side}", 0, lambda: run)


def cases() -> Iterator[Case]:
    """What most of a guided step of SD 1.5 at 512x512 is."""
    yield from (linear(8192, 320, 320), linear(8192, 1280, 320), linear(2048, 640, 640), linear(2048, 2560, 640))
    yield from (linear(512, 1280, 1280), linear(128, 11520, 1280), linear(154, 768, 1280))
    yield from (geglu(8192, 320, 1280), geglu(2048, 640, 2560), geglu(512, 1280, 5120))
    yield from (attention(4096, 4096, 40), attention(1024, 1024, 80), attention(256, 256, 160), attention(4096, 77, 40))
    yield from (convolution(4, 64, 320, 320), convolution(4, 32, 640, 640), convolution(4, 32, 1280, 640))
    yield convolution(2, 16, 1280, 1280)
    yield from (group_norm(320, 64), group_norm(1280, 16))


def build(sources: Path, instruction_set: str | None = None) -> ctypes.CDLL:
    """The library of a folder's sources, by default for the set that `native` builds for.

    Raises ValueError for what cannot be built.
    """
    variable = {} if instruction_set is None else {"SD_CPU_ISA": instruction_set}
    text = "".join(source.read_text() for source in sources.glob("*.cpp"))
    known = {  # an older commit lacks some functions
        table: {name: types for name, types in getattr(native, table).items() if f" {name}(" in text}
        for table in ("SIGNATURES", "SIZES")
    }
    if not known["SIGNATURES"]:
        raise ValueError(f"{sources}: holds no kernels")
    with mock.patch.dict(os.environ, variable), mock.patch.multiple(native, SOURCES=sources, **known):
        library, reason = native.attempt.__wrapped__()
    if library is None:
        raise ValueError(f"{sources}: {reason}")
    return library


def use(library: ctypes.CDLL) -> None:
    native.load = lambda: library


def compare(builds: Sequence[ctypes.CDLL], case: Case, rounds: int) -> dict[str, str]:
    """A row of the table: the speed-up is the first build's time over the second's, of the same rounds."""

    def timed(library: ctypes.CDLL, run: Run) -> float:
        use(library)
        return common.timed(run, torch.device("cpu"))

    calls = []
    for library in builds:
        use(library)
        calls.append(functools.partial(timed, library, case.make()))
    common.interleave(calls, 1)
    other, here = common.interleave(calls, rounds)
    ratio = Spread.of([a / b for a, b in zip(other, here, strict=True)])
    rates = [f"{case.flops / Spread.of(seconds).median / 1e9:.0f}" if case.flops else "" for seconds in (other, here)]
    speedup = f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
    return {"kernel": case.label, "other GFLOP/s": rates[0], "here GFLOP/s": rates[1], "speed-up": speedup}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, metavar="FOLDER", nargs="?", help="another sd/kernels/cpp (this one)")
    parser.add_argument("--other-set", choices=native.SETS, metavar="NAME", help="instruction set of the other build")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name has it")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="(%(default)s)")
    args = parser.parse_args(argv)
    try:
        builds = [build(args.other or native.SOURCES, args.other_set), build(native.SOURCES)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with freed_memory_kept():
        common.print_table("", [compare(builds, case, args.rounds) for case in cases() if args.only in case.label])
    return 0


if __name__ == "__main__":
    sys.exit(main())

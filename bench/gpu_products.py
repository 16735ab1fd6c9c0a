"""Own matrix products beside cuBLAS and cuDNN, at the shapes of SD 1.5's step: `python bench/gpu_products.py OUT.csv`.

Each call has weights of its own, as in a step: more of them than the L2 cache holds, in one CUDA graph.
`--compile 1/8` only compiles an eighth of the kernels, so that eight processes fill Triton's cache at once.
"""

import argparse
import itertools
import logging
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common
from bench.reference.numbers import relative_error
from sd.kernels import gpu
from sd.kernels.gpu_products import Tile, conv3x3_split, geglu_product

log = logging.getLogger("gpu_products")

GEGLU = ((8192, 320), (2048, 640), (512, 1280), (128, 1280))
"""Rows and width of the four levels at 512x512 with guidance; the projection has 8 times the width."""
CONVS = ((1280, 8), (2560, 8), (1280, 16))
"""Channels in and side, to 1280 channels."""
GEGLU_TILES = (
    Tile(128, 64, 64, 8, 3),
    Tile(128, 64, 64, 4, 3),
    Tile(128, 64, 64, 8, 4),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 64, 64, 8, 2),
    Tile(64, 64, 64, 4, 4),
)
CONV_TILES = (Tile(64, 64, 64, 4, 4), Tile(64, 64, 64, 4, 6), Tile(64, 64, 128, 4, 3), Tile(64, 32, 64, 4, 6))
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Trial:
    """One way to compute something: call(x, weight, bias)."""

    what: str
    name: str
    rows: int
    depth: int
    columns: int
    make: Callable[[int], tuple[Tensor, Tensor, Tensor]]
    call: Call
    plain: Call

    def __str__(self) -> str:
        return f"{self.what} {self.rows} x {self.depth} x {self.columns}, {self.name}"

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.depth * self.columns


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=device) * scale).half()


def geglu_trials() -> Iterator[Trial]:
    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        value, gate = F.linear(x, weight, bias).chunk(2, -1)
        return value * F.gelu(gate)

    for rows, width in GEGLU:

        def make(seed: int, rows: int = rows, width: int = width) -> tuple[Tensor, Tensor, Tensor]:
            return (
                draw(rows, width, seed=seed),
                draw(8 * width, width, seed=seed + 1, scale=width**-0.5),
                draw(8 * width, seed=seed + 2),
            )

        def trial(name: str, call: Call, rows: int = rows, width: int = width, make=make) -> Trial:
            return Trial("geglu", name, rows, width, 8 * width, make, call, plain)

        yield trial("cuBLAS, PyTorch", plain)
        yield trial("cuBLAS, then fused-geglu", lambda x, w, b: gpu.geglu(F.linear(x, w), b))
        for tile in GEGLU_TILES:
            yield trial(f"geglu_product, {tile}", lambda x, w, b, tile=tile: geglu_product(x, w, b, tile))


def patches(x: Tensor) -> Tensor:
    """[B, C, H, W] in channels-last -> [B*H*W, 9*C], taps first."""
    grid = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    channels = grid.shape[-1]
    rows = grid.unfold(1, 3, 1).unfold(2, 3, 1)  # [B, H, W, C, 3, 3]
    return rows.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * channels)


def conv_trials() -> Iterator[Trial]:
    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    for channels, side in CONVS:

        def make(seed: int, channels: int = channels, side: int = side) -> tuple[Tensor, Tensor, Tensor]:
            x = draw(2, channels, side, side, seed=seed).contiguous(memory_format=torch.channels_last)
            weight = draw(1280, channels, 3, 3, seed=seed + 1, scale=(9 * channels) ** -0.5)
            return x, weight.contiguous(memory_format=torch.channels_last), draw(1280, seed=seed + 2)

        def trial(name: str, call: Call, channels: int = channels, side: int = side, make=make) -> Trial:
            return Trial("conv", name, 2 * side * side, 9 * channels, 1280, make, call, plain)

        def by_patches(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            y = F.linear(patches(x), w.permute(0, 2, 3, 1).flatten(1), b)
            return y.view(x.shape[0], x.shape[2], x.shape[3], -1).permute(0, 3, 1, 2)

        yield trial("cuDNN", plain)
        yield trial("cuDNN, no bias", lambda x, w, b: F.conv2d(x, w, padding=1))
        yield trial("patches, cuBLAS", by_patches)
        for tile in CONV_TILES:
            yield trial(f"conv3x3_split, {tile}", lambda x, w, b, tile=tile: conv3x3_split(x, w, b, tile))


def microseconds(trial: Trial, calls: int) -> float:
    """Of one call: `calls` of them, each with numbers of its own, in one CUDA graph."""
    inputs = [trial.make(10 * i) for i in range(calls)]
    run = lambda: [trial.call(*given) for given in inputs]  # noqa: E731
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(12)]
    for mark in marks:
        mark.record()
        graph.replay()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / calls


@torch.inference_mode()
def measure(trials: Sequence[Trial], out: Path) -> None:
    for trial in trials:
        x, weight, bias = trial.make(1)
        row = {
            "what": trial.what,
            "rows": trial.rows,
            "depth": trial.depth,
            "columns": trial.columns,
            "way": trial.name,
        }
        try:
            exact = trial.plain(x.float(), weight.float(), bias.float())
            error = relative_error(trial.call(x, weight, bias), exact)
            us = microseconds(trial, 12)
            row |= {"us": common.cell(us), "tflops": common.cell(trial.flops / us / 1e6), "error": common.cell(error)}
            log.info("%-70s %7.1f us %5.0f TFLOP/s, error %.1e", trial, us, trial.flops / us / 1e6, error)
        except Exception as error:
            log.info("%s: %s: %s", trial, type(error).__name__, str(error).splitlines()[:1])
            continue
        common.append_csv(out, row | common.environment(x.device, torch.float16))


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--compile", metavar="I/N", help="only compile the I-th of N shares")
    args = parser.parse_args()
    trials = [*geglu_trials(), *conv_trials()]
    if not args.compile:
        measure(trials, args.out)
        return
    share, shares = map(int, args.compile.split("/"))
    with torch.inference_mode():
        for trial in trials[share::shares]:
            try:
                trial.call(*trial.make(1))
            except Exception as error:
                log.info("%s: %s", trial, error)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()

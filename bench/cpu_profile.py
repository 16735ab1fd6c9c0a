"""Where a guided step on a CPU goes, or a decoding, kernel by kernel.

    python bench/cpu_profile.py --size 512 --opts cpu

The C++ kernels of sd/kernels/native.py are timed one call at a time, shapes apart. GFLOP/s are those of the direct
algorithm: Winograd's are higher than the processor's. "the rest" is PyTorch's own.
"""

import argparse
import functools
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common
from sd import optimizations
from sd.kernels import native
from sd.kernels.allocator import freed_memory_kept


class Clock:
    """Seconds, calls and floating-point operations of each kernel and shape."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.run, native._call = native._call, self.timed

    def timed(self, name: str, *arguments: Any) -> None:
        start = time.perf_counter()
        self.run(name, *arguments)
        seconds = time.perf_counter() - start
        label, flops = kernel(name, arguments)
        self.seconds[label] += seconds
        self.calls[label] += 1
        self.flops[label] += flops


def kernel(name: str, arguments: tuple) -> tuple[str, int]:
    """A call's row in the table, and the operations of the direct algorithm."""
    if name in ("sd_linear", "sd_geglu"):
        rows, inner, columns = arguments[-3:]
        return f"{name} {rows} x {inner} x {columns}", 2 * rows * inner * columns * (1 + (name == "sd_geglu"))
    if name == "sd_attention":
        batch, heads, queries, keys, size = arguments[4:9]
        return f"{name} {queries} x {keys}, heads of {size}", 4 * batch * heads * queries * keys * size
    if name == "sd_winograd":
        _, batch, height, width, channels, _, _, out_channels, *_, m = arguments
        return f"{name} F({m}x{m}) at {height}x{width}", 18 * batch * height * width * channels * out_channels
    if name == "sd_dot_attention":
        batch, heads, queries, keys, size = arguments[4:9]
        return f"{name} {queries} x {keys}, heads of {size}", 4 * batch * heads * queries * keys * size
    if name == "sd_dot_product":
        numbers, _, _, rows, height, width, taps, groups, _, _, _, columns = arguments[:12]
        inner = taps * groups * {1: 2, 2: 4}[numbers]
        kind = f"{'bf16' if numbers == 1 else 'int8'}{f' at {height}x{width}' if height else ''}"
        return f"{name} {kind} {rows} x {inner} x {columns}", 2 * rows * inner * columns
    if name == "sd_dot_grid":
        return f"{name} at {arguments[5]}x{arguments[6]}", 0
    return name, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, metavar="PIXELS", help="(%(default)s)")
    parser.add_argument("--opts", default="cpu", metavar="NAMES", help="(%(default)s)")
    parser.add_argument("--weights", default="random", metavar="FILE", help="(%(default)s)")
    parser.add_argument("--decode", action="store_true", help="the VAE's decoder in place of a step")
    args = parser.parse_args()
    pipe = common.load_pipeline(args.weights, torch.device("cpu"), torch.float32)
    optimizations.apply(pipe, args.opts)
    pipe.call.halves_alike = True  # as they are within a picture
    side = args.size // pipe.config.vae.downsampling
    x = torch.randn(1, pipe.config.unet.in_channels, side, side).repeat(2, 1, 1, 1)
    context = torch.randn(2, pipe.config.text.max_length, pipe.config.unet.context_dim)
    run = functools.partial(pipe.unet, x, torch.tensor(500), context)
    if args.decode:
        run = functools.partial(pipe.vae.decode, x[:1])
    with torch.inference_mode(), freed_memory_kept():
        for _ in range(2):
            run()
        clock, start = Clock(), time.perf_counter()
        run()
        show(clock, time.perf_counter() - start)


def show(clock: Clock, step: float) -> None:
    print(f"step {step:.2f} s, instruction set {native.instruction_set()}, {torch.get_num_threads()} threads")
    for label, seconds in clock.seconds.most_common():
        rate = f"{clock.flops[label] / seconds / 1e9:6.0f} GFLOP/s" if clock.flops[label] else ""
        print(f"{label:48} {clock.calls[label]:4} calls {seconds * 1e3:7.0f} ms {rate}")
    print(f"{'the rest':48} {'':10} {(step - clock.seconds.total()) * 1e3:7.0f} ms")


if __name__ == "__main__":
    main()

"""Which products of the UNet may be int8: the error of the noise with kinds of them left in bf16.

    python bench/int8_kinds.py                      # the demo model, a minute

Every row calibrates as `cpu-int8` does, with its prompts, and runs the same calls of the UNet: those of ten DDIM steps
of four other prompts, as the plain model makes them. Errors are relative to the plain model's noise, their mean over
the steps. Share: of the arithmetic of all products but the first and the last convolution and the text's.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common
from bench.fidelity import PROMPTS
from bench.reference.numbers import relative_error
from sd.kernels import native
from sd.optimizations import cpu_int8
from sd.optimizations.base import Record
from sd.optimizations.dot_layers import Packed, put_in
from sd.pipeline import DEMO_CHECKPOINT, StableDiffusion

Kind = Callable[[str], bool]
Calls = list[tuple[tuple[Tensor, ...], Tensor]]

UNBOUNDED: Kind = lambda name: name.endswith("skip_connection")  # noqa: E731
RESIZING: Kind = lambda name: name.endswith((".op", ".conv"))  # noqa: E731
SECOND: Kind = lambda name: name.endswith("ff.net.2")  # noqa: E731
LAST_PROJECTION: Kind = lambda name: name.endswith("proj_out")  # noqa: E731


def kinds(last: str) -> dict[str, tuple[Kind, ...]]:
    """Rows: what stays in bf16. last: the name of the last output block."""
    in_last: Kind = lambda name: name.startswith(last)  # noqa: E731
    return {
        "none": (),
        "1x1 convolutions of residual blocks": (UNBOUNDED,),
        "and those that change the grid": (UNBOUNDED, RESIZING),
        "and the feed-forwards' second layers": (UNBOUNDED, RESIZING, SECOND),
        "and the last output block": (UNBOUNDED, RESIZING, SECOND, in_last),
        "the third row and the transformers' last projections": (UNBOUNDED, RESIZING, SECOND, LAST_PROJECTION),
        "feed-forwards' second layers alone": (SECOND,),
        "transformers' last projections alone": (LAST_PROJECTION,),
        "GEGLU alone": (lambda name: name.endswith("ff.net.0"),),
        "attention's projections alone": (lambda name: name.endswith(("attn1", "to_q", "to_out.0")),),
        "residual blocks' 3x3 convolutions alone": (lambda name: name.endswith(("in_layers.2", "out_layers.3")),),
    }


def calls_of(pipe: StableDiffusion, steps: int) -> Calls:
    """What the plain UNet is called with, and what it returns."""
    seen: Calls = []
    handle = pipe.unet.register_forward_hook(
        lambda module, given, y: seen.append((tuple(x.clone() for x in given), y.clone()))
    )
    pipe.generate(list(PROMPTS[:4]), steps=steps, seed=0, sampler="ddim")
    handle.remove()
    return seen


def products(unet: nn.Module) -> dict[str, Packed]:
    """All but the first and the last convolution and the text's keys and values."""
    return dict(cpu_int8.products(unet))


def error(pipe: StableDiffusion, calls: Calls) -> float:
    with torch.inference_mode():
        errors = [relative_error(pipe.unet(*given), y) for given, y in calls]
    return sum(errors) / len(errors)


@torch.no_grad()
def measure(pipe: StableDiffusion, calls: Calls, stays: tuple[Kind, ...] | None) -> float:
    """stays: kinds of products that do; None is all."""
    record = Record(pipe)
    put_in(record.patch("cpu-int8"))
    marked = {
        name: packed
        for name, packed in products(pipe.unet).items()
        if stays is not None and not any(kind(name) for kind in stays)
    }
    if marked:
        for name, scale in cpu_int8.calibrated(pipe, marked, cpu_int8.PROMPTS, 5, None).items():
            marked[name].quantize(scale)
    found = error(pipe, calls)
    record.undo()
    return found


def multiplications(pipe: StableDiffusion, calls: Calls) -> dict[str, int]:
    """Of each layer in a call of the plain UNet."""
    counts: dict[str, int] = {}

    def count(name: str) -> Callable:
        def hook(module: nn.Module, given: tuple, y: Tensor) -> None:
            rows = y.numel() // module.weight.shape[0]
            counts[name] = rows * module.weight.numel()

        return hook

    layers = [(n, m) for n, m in pipe.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_hook(count(name)) for name, layer in layers]
    with torch.inference_mode():
        pipe.unet(*calls[0][0])
    for handle in handles:
        handle.remove()
    return counts


def share(counts: dict[str, int], names: list[str], stays: tuple[Kind, ...]) -> float:
    """Of the arithmetic of the products by these names. A product of several layers has their names below its own."""
    of = {n: sum(c for layer, c in counts.items() if layer == n or _within(layer, n)) for n in names}
    return sum(of[n] for n in names if not any(kind(n) for kind in stays)) / sum(of.values())


def _within(layer: str, product: str) -> bool:
    own = layer.removeprefix(f"{product}.")
    return own != layer and own in ("to_q", "to_k", "to_v", "proj")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=DEMO_CHECKPOINT, metavar="FILE", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="(%(default)s)")
    args = parser.parse_args()
    if why := native.why_not():
        print(f"int8_kinds.py: {why}", file=sys.stderr)
        return 2
    pipe = StableDiffusion.load(args.weights, "cpu", torch.float32)
    calls = calls_of(pipe, args.steps)
    counts = multiplications(pipe, calls)
    record = Record(pipe)
    put_in(record.patch("cpu-int8"))
    names = list(products(pipe.unet))
    record.undo()
    rows = [{"stays in bf16": "all", "share in int8": "0%", "error": f"{1e3 * measure(pipe, calls, None):.1f}e-3"}]
    for label, stays in kinds(f"output_blocks.{len(pipe.unet.output_blocks) - 1}.").items():
        found = f"{1e3 * measure(pipe, calls, stays):.1f}e-3"
        rows.append({"stays in bf16": label, "share in int8": f"{share(counts, names, stays):.0%}", "error": found})
    common.print_table(f"{pipe.config.name}, {native.instruction_set()}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

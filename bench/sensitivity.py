"""For each layer that a quantization scheme can take: its speed-up, and what it alone does to the latents.

    python bench/sensitivity.py --schemes int8_static --size 512 --damage-size 128 --budget 600
    python bench/sensitivity.py --weights data/demo/sd-demo.safetensors.index.json

Each layer is quantized by itself. Speed-up: plain over quantized time of that layer on inputs of the shapes that it
gets at --size with guidance; layers of one kind and one shape are timed once. Damage: relative error, against the
plain model, of the latents after --steps DDIM steps from the same noise at --damage-size.
Rows go to a CSV file one by one, and those that are there already are not measured again. Then the layers that are not
worth it go to sd/optimizations/quantize_filter.json, which the switches read: those slower than --min-speedup, and
those over --max-damage. Random weights say nothing about damage, so with them speed alone decides.
Exit code 75 says that --budget ended before the layers.
"""

import argparse
import copy
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common
from bench.reference.numbers import relative_error
from sd.config import Config
from sd.guidance import Conditions
from sd.noise import PictureNoise
from sd.optimizations import quantization
from sd.pipeline import StableDiffusion, default_device
from sd.samplers import choose
from sd.schedules import leading
from sd.unet import UNet

UNFINISHED = 75
PROMPT = "a red apple"
Shapes = tuple[tuple[int, ...], ...]
log = logging.getLogger("sensitivity")


@dataclass
class Bench:
    """A plain pipeline, what it draws, and the speed-ups measured so far."""

    pipe: StableDiffusion
    weights: str
    size: int
    damage_size: int
    steps: int = 2
    pairs: int = 5
    speedups: dict[tuple, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self):
        self.shapes = input_shapes(self.pipe.config, self.size)
        self.plain_latents = self.latents()

    def row(self, scheme: str, layer: str) -> dict[str, str | int]:
        """Measure one layer: a row of the CSV file."""
        plain = self.pipe.unet.get_submodule(layer)
        with quantized_alone(self.pipe, scheme, layer, self.damage_size) as quantized:
            damage = relative_error(self.latents(), self.plain_latents)
            plain_seconds, seconds = self.times(scheme, plain, quantized, self.shapes[layer])
        return {
            **self.key(scheme, layer),
            "inputs": " ".join("x".join(map(str, shape)) for shape in self.shapes[layer]),
            "weights_mb": common.cell(sum(p.numel() * p.element_size() for p in plain.parameters()) / 1e6),
            "plain_ms": common.cell(plain_seconds * 1e3),
            "quantized_ms": common.cell(seconds * 1e3),
            "speedup": common.cell(plain_seconds / seconds),
            "damage": common.cell(damage),
            **common.environment(self.pipe.device, self.pipe.dtype),
        }

    def key(self, scheme: str, layer: str) -> dict[str, str | int]:
        """What tells a row from others in one file."""
        return {
            "model": self.pipe.config.name,
            "weights": self.weights,
            "scheme": scheme,
            "layer": layer,
            "size": self.size,
            "damage_size": self.damage_size,
            "steps": self.steps,
        }

    @torch.no_grad()
    def latents(self) -> Tensor:
        """The latents after a few steps of guided sampling, always from the same noise."""
        config = self.pipe.config
        side = self.damage_size // config.vae.downsampling
        noise = PictureNoise([0], (config.vae.z_channels, side, side), self.pipe.device, torch.float32)
        conditions = Conditions(self.pipe.encode_prompts([PROMPT], [""]), 7.5)
        return self.pipe.sample(noise(), conditions, choose("ddim"), leading(self.steps), noise)

    def times(self, scheme: str, plain: nn.Module, quantized: nn.Module, shapes: Shapes) -> tuple[float, float]:
        """Median seconds of a call of the plain and of the quantized layer."""
        kind = (scheme, type(plain), shapes, tuple(p.shape for p in plain.parameters()))
        if kind not in self.speedups:
            self.speedups[kind] = time_pair(plain, quantized, shapes, self.pipe, self.pairs)
        return self.speedups[kind]


@torch.no_grad()
def time_pair(
    plain: nn.Module, quantized: nn.Module, shapes: Shapes, pipe: StableDiffusion, pairs: int
) -> tuple[float, float]:
    inputs = [torch.randn(shape).to(pipe.device, pipe.dtype) for shape in shapes]
    calls: list[Callable[[], float]] = [
        lambda module=module: common.timed(lambda: module(*inputs), pipe.device) for module in (plain, quantized)
    ]
    for call in calls:
        call()
    plain_seconds, quantized_seconds = common.interleave(calls, pairs)
    return statistics.median(plain_seconds), statistics.median(quantized_seconds)


@torch.no_grad()
def input_shapes(config: Config, size: int) -> dict[str, Shapes]:
    """The shapes that each module of the UNet gets for one guided picture, found on the meta device."""
    shapes: dict[str, Shapes] = {}

    def note(name: str, inputs: tuple) -> None:
        shapes[name] = tuple(tuple(t.shape) for t in inputs if isinstance(t, Tensor))

    side = size // config.vae.downsampling
    with torch.device("meta"):
        unet = UNet(config.unet)
        for name, module in unet.named_modules():
            module.register_forward_pre_hook(lambda _module, inputs, name=name: note(name, inputs))
        x = torch.empty(2, config.unet.in_channels, side, side)
        unet(x, torch.empty((), dtype=torch.int64), torch.empty(2, config.text.max_length, config.unet.context_dim))
    return shapes


@contextmanager
def quantized_alone(pipe: StableDiffusion, scheme: str, layer: str, size: int) -> Iterator[nn.Module]:
    """The pipeline with one layer quantized; afterwards it is plain again."""
    plain = pipe.unet.get_submodule(layer)
    pipe.unet.set_submodule(layer, copy.deepcopy(plain))
    try:
        calibration = {"prompts": quantization.CALIBRATION_PROMPTS[:1], "steps": 1, "size": size}
        quantization.quantize(pipe, scheme, [layer], **(calibration if scheme == "int8_static" else {}))
        yield pipe.unet.get_submodule(layer)
    finally:
        pipe.unet.set_submodule(layer, plain)
        vars(pipe.unet).pop("quantization", None)
        vars(pipe).pop("record", None)


def measure(bench: Bench, schemes: Sequence[str], out: Path, deadline: float) -> bool:
    """Measure what is not in `out` yet; False if the time was up before the end."""
    done = [{key: row[key] for key in bench.key("", "")} for row in common.read_csv(out)]
    for scheme in schemes:
        for layer in quantization.candidates(bench.pipe.unet, scheme):
            if {key: str(value) for key, value in bench.key(scheme, layer).items()} in done:
                continue
            if time.monotonic() > deadline:
                return False
            row = bench.row(scheme, layer)
            common.append_csv(out, row)
            log.info("%s %s: %s times as fast, damage %s", scheme, layer, row["speedup"], row["damage"])
    return True


def worthless(rows: Sequence[dict[str, str]], min_speedup: float, max_damage: float) -> list[str]:
    """The layers to leave alone. Damage counts on trained weights only."""
    return [
        row["layer"]
        for row in rows
        if float(row["speedup"]) < min_speedup or (row["weights"] != "random" and float(row["damage"]) > max_damage)
    ]


def write_filter(bench: Bench, schemes: Sequence[str], out: Path, args: argparse.Namespace) -> None:
    """Put each scheme's layers to skip into args.filter, leaving other models and schemes in it as they are."""
    filters = json.loads(args.filter.read_text()) if args.filter.exists() else {}
    same = ("model", "weights", "size", "damage_size", "steps")
    for scheme in schemes:
        key = {name: str(value) for name, value in bench.key(scheme, "").items()}
        rows = [row for row in common.read_csv(out) if all(row[name] == key[name] for name in (*same, "scheme"))]
        if not rows:
            continue
        # Weight-only is chosen for memory and slows every layer down.
        min_speedup = 0.0 if scheme == "int8_weight_only" else args.min_speedup
        filters.setdefault(bench.pipe.config.name, {})[scheme] = {
            "rule": f"speed-up under {min_speedup:g}, or damage over {args.max_damage:g} on trained weights",
            "measured": f"{len(rows)} layers, weights {bench.weights}, {bench.size} pixels, {rows[-1]['device']}, "
            f"torch {rows[-1]['torch']}, commit {rows[-1]['commit']}",
            "skip": worthless(rows, min_speedup, args.max_damage),
        }
    temporary = args.filter.with_name(args.filter.name + ".part")
    temporary.write_text(json.dumps(filters, indent=2) + "\n")
    temporary.replace(args.filter)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    description, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemes", default="int8_weight_only,int8_static", metavar="A,B", help="(%(default)s)")
    parser.add_argument(
        "--weights", default="random", metavar="FILE", help="a checkpoint, or random for SD 1.5's shapes"
    )
    parser.add_argument("--size", type=int, default=512, metavar="PIXELS", help="for the speed (%(default)s)")
    parser.add_argument("--damage-size", type=int, default=128, metavar="PIXELS", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="for the damage (%(default)s)")
    parser.add_argument("--pairs", type=int, default=5, metavar="N", help="calls timed a layer (%(default)s)")
    parser.add_argument("--min-speedup", type=float, default=1.0, metavar="X", help="(%(default)s)")
    parser.add_argument("--max-damage", type=float, default=0.02, metavar="X", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/results/sensitivity.csv"), metavar="FILE")
    parser.add_argument("--filter", type=Path, default=quantization.FILTER_FILE, metavar="FILE", help="(%(default)s)")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="start no layer after this"
    )
    args = parser.parse_args(argv)
    args.schemes = args.schemes.split(",")
    if unknown := set(args.schemes) - set(quantization.SCHEMES):
        parser.error(f"no scheme {', '.join(sorted(unknown))}; there are {', '.join(quantization.SCHEMES)}")
    return args


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("sd.optimizations.quantization").setLevel(logging.ERROR)  # a line a layer
    args = parse_arguments(argv)
    deadline = time.monotonic() + args.budget
    try:
        device = default_device()
        pipe = common.load_pipeline(args.weights, device, common.default_dtype(device))
        weights = "random" if args.weights == "random" else Path(args.weights).name
        bench = Bench(pipe, weights, args.size, args.damage_size, args.steps, args.pairs)
        finished = measure(bench, args.schemes, args.out, deadline)
        write_filter(bench, args.schemes, args.out, args)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if finished else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())

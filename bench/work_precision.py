"""How near each sampler comes to the exact solution, by how often it calls the UNet: `python bench/work_precision.py`.

Samplers that draw no noise all solve one differential equation, from the same first latents: the last latents are
compared with those of a thousand steps (dpmpp_2m of third order, karras). Each runs with its own schedule and with
karras. Adds to work_precision.csv in OUT, and draws work_precision.png from all that is there of these weights.
"""

import argparse
import logging
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common, fidelity
from bench.common import ROOT
from bench.reference.numbers import relative_error
from sd import optimizations
from sd.pipeline import StableDiffusion, find_checkpoint
from sd.samplers import SAMPLERS

log = logging.getLogger("work_precision")

STEPS = (5, 8, 10, 15, 20, 30, 50)
EXACT = {"sampler": "dpmpp_2m", "solver_order": 3, "schedule": "karras", "steps": 1000}
NOISY = ("ddpm", "lcm", "tcd")


@dataclass(frozen=True)
class Way:
    """A sampler with a schedule, or its own, and a number of steps."""

    sampler: str
    schedule: str | None
    steps: int

    @property
    def calls(self) -> int:
        """Of the UNet: those of two calls a step make one in the last."""
        twice = SAMPLERS[self.sampler].calls == 2
        return 2 * self.steps - 1 if twice else self.steps + (self.sampler == "plms")


def ways(samplers: list[str], most: int) -> Iterator[Way]:
    for name in samplers:
        for schedule in (None,) if name == "plms" else (None, "karras"):
            for steps in STEPS:
                if (way := Way(name, schedule, steps)).calls <= most:
                    yield way


def deterministic() -> list[str]:
    return [name for name, one in SAMPLERS.items() if name not in NOISY and "s_noise" not in one.defaults]


def last_latents(pipe: StableDiffusion, count: int, scale: float, **options) -> list[Tensor]:
    """Of `count` of the prompts of the fidelity benchmark, one a time."""
    found: list[Tensor] = []
    for seed, prompt in enumerate(fidelity.PROMPTS[:count]):
        kept: list[Tensor] = []
        pipe.generate(
            prompt, seed=seed, cfg_scale=scale, on_step=lambda _i, _n, x, kept=kept: kept.append(x), **options
        )
        found.append(kept[-1].clone())
    return found


def measure(pipe: StableDiffusion, args: argparse.Namespace) -> None:
    held = {"weights": Path(args.weights).name, "prompts": args.prompts, "cfg_scale": args.scale}
    exact = last_latents(pipe, args.prompts, args.scale, **EXACT)
    log.info("the solution is there")
    for way in ways(args.samplers or deterministic(), args.calls):
        found = last_latents(
            pipe, args.prompts, args.scale, sampler=way.sampler, schedule=way.schedule, steps=way.steps
        )
        errors = [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
        row = {"sampler": way.sampler, "schedule": way.schedule or SAMPLERS[way.sampler].schedule}
        row |= {"steps": way.steps, "calls": way.calls, "error": common.cell(statistics.median(errors))}
        row |= {"error_worst": common.cell(max(errors))}
        log.info("%s", row)
        common.append_csv(args.out / "work_precision.csv", held | row | common.environment(pipe.device, pipe.dtype))


def plot(out: Path, weights: str) -> None:
    from matplotlib.figure import Figure

    lines: dict[tuple[str, str], dict[int, float]] = {}
    for row in common.read_csv(out / "work_precision.csv"):
        if row["weights"] == weights:
            lines.setdefault((row["sampler"], row["schedule"]), {})[int(row["calls"])] = float(row["error"])
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(sampler for sampler, _ in lines))}
    for (sampler, schedule), points in lines.items():
        style = {"color": colors[sampler], "linestyle": "-" if schedule == "karras" else ":", "marker": "."}
        axes.plot(sorted(points), [points[calls] for calls in sorted(points)], label=f"{sampler}, {schedule}", **style)
    axes.set(xscale="log", yscale="log", xlabel="calls of the UNet", ylabel="error of the last latents")
    axes.set_title(f"{weights}: distance from the solution of 1,000 steps")
    axes.set_xticks(ticks := [5, 10, 20, 30, 50, 100], [str(tick) for tick in ticks])
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(out / "work_precision.png", dpi=110)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", default=str(find_checkpoint()), metavar="FILE", help="(those that are there)")
    parser.add_argument("--device", help="cuda or cpu (the best there is)")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="pictures (%(default)s)")
    parser.add_argument("--scale", type=float, default=7.5, metavar="X", help="guidance (%(default)s)")
    parser.add_argument("--calls", type=int, default=60, metavar="N", help="at most (%(default)s)")
    parser.add_argument("--samplers", nargs="*", metavar="NAME", help="(all that draw no noise)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "work_precision", metavar="DIR")
    args = parser.parse_args(argv)
    pipe = StableDiffusion.load(args.weights, device=args.device, dtype=torch.float32)
    optimizations.apply(pipe, "default")
    measure(pipe, args)
    plot(args.out, Path(args.weights).name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""This implementation beside diffusers, over the same weights in memory, in one process, call by call.

    python bench/vs_diffusers.py --size 256              # one guided step of the plain UNet, both eager
    python bench/vs_diffusers.py --pipeline --opts exact --compiled   # whole pictures, diffusers compiled as well

First the two are compared, and what differs by more than rounding is not timed (exit code 1): bench/parity.py.
`--parity-only` does that in every dtype, and times nothing. Ratios are each contestant's time over the plain one's
here, taken round by round: above 1, this one is faster.
"""

import argparse
import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common, parity, speed
from bench.common import Spread
from bench.parity import Drawn
from bench.reference.numbers import relative_error
from bench.rungs import Row, parse_names
from sd.optimizations import OptimizationError
from sd.pipeline import StableDiffusion, default_device

log = logging.getLogger("vs_diffusers")


@dataclass
class Contestant:
    """Something to time: a call and what it gave last. `warm_up_s` is the first call's time, compilation included."""

    name: str
    call: Callable[[], Tensor]
    warm_up_s: float = 0.0
    output: Tensor | None = field(default=None, repr=False)

    def run(self) -> None:
        self.output = self.call()


# ---- one guided step of the UNet


def step_contestants(pipe: StableDiffusion, args: argparse.Namespace) -> list[Contestant]:
    from bench.reference.oracles import diffusers_unet

    inputs = parity.step_inputs(pipe, args.size, args.batch)
    theirs = diffusers_unet(pipe.unet, pipe.config.unet)
    contestants = [
        Contestant("ours, plain", functools.partial(pipe.unet, *inputs)),
        Contestant("diffusers, eager", functools.partial(parity.their_step, theirs, *inputs)),
    ]
    if args.compiled:
        unet = diffusers_unet(pipe.unet, pipe.config.unet).to(memory_format=torch.channels_last)
        call = functools.partial(parity.their_step, compiled(unet, args), *inputs)
        contestants.append(Contestant(f"diffusers, {compiled_name(args)}", call))
    return contestants


def compiled_name(args: argparse.Namespace) -> str:
    return f"channels_last, compiled ({args.compile_mode})"


def compiled(model: Callable, args: argparse.Namespace) -> Callable:
    return torch.compile(model, mode=args.compile_mode, fullgraph=True)


# ---- whole pictures


def picture_contestants(pipe: StableDiffusion, args: argparse.Namespace) -> list[Contestant]:
    from bench.reference.oracles import ddim_scheduler, diffusers_pipeline

    drawn = Drawn(args.size, args.steps, args.batch)
    theirs = diffusers_pipeline(pipe, ddim_scheduler())
    contestants = [
        Contestant("ours, plain", functools.partial(parity.our_picture, pipe, drawn)),
        Contestant("diffusers, eager", functools.partial(parity.their_picture, theirs, pipe.config, drawn)),
    ]
    if args.opts != "none":
        row = Row(args.opts, tuple(parse_names(args.opts, pipe.device)))
        fast = speed.optimized(pipe, row)
        contestants.append(Contestant(f"ours, {args.opts}", functools.partial(parity.our_picture, fast, drawn)))
    if args.compiled:
        theirs = diffusers_pipeline(pipe, ddim_scheduler())
        theirs.unet = compiled(theirs.unet.to(memory_format=torch.channels_last), args)
        theirs.vae.to(memory_format=torch.channels_last)
        theirs.vae.decode = compiled(theirs.vae.decode, args)
        call = functools.partial(parity.their_picture, theirs, pipe.config, drawn)
        contestants.append(Contestant(f"diffusers, {compiled_name(args)}", call))
    return contestants


# ---- timing


@torch.inference_mode()
def compete(contestants: list[Contestant], device: torch.device, rounds: int) -> list[list[float]]:
    """Seconds of every contestant in every round, after two calls to warm up."""
    for contestant in contestants:
        contestant.warm_up_s = common.timed(contestant.run, device)
        contestant.run()
        log.info("%s: first call %.1f s", contestant.name, contestant.warm_up_s)
    calls = [functools.partial(common.timed, contestant.run, device) for contestant in contestants]
    return common.interleave(calls, rounds)


def lines_of(contestants: list[Contestant], seconds: list[list[float]]) -> list[dict[str, str]]:
    """One line each: medians, quartiles, how its time compares with our plain one's, and how far its output is off."""
    lines = []
    for contestant, times in zip(contestants, seconds, strict=True):
        spread = Spread.of(times)
        ratio = Spread.of([theirs / ours for theirs, ours in zip(times, seconds[0], strict=True)])
        line = {
            "contestant": contestant.name,
            "rounds": len(times),
            "median_s": spread.median,
            "q1_s": spread.low,
            "q3_s": spread.high,
            "over_ours_plain": ratio.median,
            "over_ours_plain_q1": ratio.low,
            "over_ours_plain_q3": ratio.high,
            "warm_up_s": contestant.warm_up_s,
            "relative_error": relative_error(contestant.output, contestants[0].output),
        }
        lines.append({column: common.cell(value) for column, value in line.items()})
    return lines


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    description, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", action="store_true", help="whole pictures instead of one step")
    parser.add_argument(
        "--parity-only", action="store_true", help="compare in every dtype, or in --dtype; time nothing"
    )
    parser.add_argument("--opts", default="none", metavar="A,B", help="with --pipeline: ours with these as well")
    parser.add_argument("--compiled", action="store_true", help="diffusers compiled and in channels_last as well")
    parser.add_argument("--compile-mode", default="reduce-overhead", help="torch.compile's (%(default)s)")
    parser.add_argument("--weights", default="random", metavar="FILE", help="a checkpoint, or SD 1.5 at random")
    parser.add_argument("--device", help="cuda or cpu (the best there is)")
    parser.add_argument("--dtype", choices=common.DTYPES, help="(float16 on CUDA, else float32)")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="of a picture (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pictures at a time (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/vs_diffusers"), metavar="DIR", help="(%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args = parse_arguments(argv)
    device = torch.device(args.device) if args.device else default_device()
    try:
        if args.parity_only:
            check_dtypes(args, device)
        else:
            run(args, device)
    except parity.Mismatch as error:
        print(f"vs_diffusers.py: {error}", file=sys.stderr)
        return 1
    except (ImportError, OptimizationError) as error:
        print(f"vs_diffusers.py: {error}", file=sys.stderr)
        return 2
    return 0


def check_dtypes(args: argparse.Namespace, device: torch.device) -> None:
    """Compare in --dtype, or in all that there are, and then raise the Mismatch of those that differ."""
    failures = []
    for name in [args.dtype] if args.dtype else common.DTYPES:
        pipe = common.load_pipeline(args.weights, device, common.DTYPES[name])
        try:
            parity.check(pipe, Drawn(args.size, args.steps, args.batch), args.out)
        except parity.Mismatch as error:
            failures.append(str(error))
        del pipe
        common.free_memory(device)
    if failures:
        raise parity.Mismatch("; ".join(failures))


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Compare, time, print, and add the lines to vs_diffusers.csv."""
    dtype = common.DTYPES[args.dtype] if args.dtype else common.default_dtype(device)
    pipe = common.load_pipeline(args.weights, device, dtype)
    parity.check(pipe, Drawn(args.size, args.steps if args.pipeline else 0, args.batch), args.out)
    contestants = (picture_contestants if args.pipeline else step_contestants)(pipe, args)
    lines = lines_of(contestants, compete(contestants, device, args.rounds))
    what = f"{args.steps} DDIM steps, whole picture" if args.pipeline else "one guided step"
    common.print_table(f"{what}, {args.size}x{args.size}, batch {args.batch}, {common.device_name(device)}", lines)
    held = {"what": what, "size": args.size, "batch": args.batch}
    for line in lines:
        row = held | line | common.environment(device, dtype) | {"diffusers": common.version("diffusers")}
        common.append_csv(args.out / "vs_diffusers.csv", row)


if __name__ == "__main__":
    sys.exit(main())

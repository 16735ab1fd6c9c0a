"""This implementation beside diffusers, over the same weights in memory, in one process, call by call.

    python bench/vs_diffusers.py --size 256              # one guided step of the plain UNet, both eager
    python bench/vs_diffusers.py --pipeline --opts exact --compiled   # whole pictures, diffusers compiled as well

Ratios are each contestant's time over the plain one's here, taken round by round: above 1, this one is faster. In half
precision diffusers draws its noise in that dtype, so it draws other pictures: compare their errors in fp32 only.
"""

import argparse
import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common, speed
from bench.common import Spread
from bench.fidelity import relative_error
from bench.rungs import Row, parse_names
from sd import optimize
from sd.pipeline import StableDiffusion, default_device

log = logging.getLogger("vs_diffusers")

PROMPT = "a lighthouse in a storm"
SEED = 7


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

    config, side = pipe.config, args.size // pipe.config.vae.downsampling
    random = functools.partial(torch.randn, device=pipe.device, dtype=pipe.dtype)
    x = random(2 * args.batch, config.unet.in_channels, side, side)
    context = random(2 * args.batch, config.text.max_length, config.unet.context_dim)
    t = torch.tensor(481, device=pipe.device)

    def their_step(unet) -> Tensor:
        return unet(x, t, encoder_hidden_states=context, return_dict=False)[0]

    contestants = [
        Contestant("ours, plain", lambda: pipe.unet(x, t, context)),
        Contestant("diffusers, eager", functools.partial(their_step, diffusers_unet(pipe.unet, config.unet))),
    ]
    if args.compiled:
        unet = diffusers_unet(pipe.unet, config.unet).to(memory_format=torch.channels_last)
        contestants.append(
            Contestant(f"diffusers, {compiled_name(args)}", functools.partial(their_step, compiled(unet, args)))
        )
    return contestants


def compiled_name(args: argparse.Namespace) -> str:
    return f"channels_last, compiled ({args.compile_mode})"


def compiled(model: Callable, args: argparse.Namespace) -> Callable:
    return torch.compile(model, mode=args.compile_mode, fullgraph=True)


# ---- whole pictures


def picture_contestants(pipe: StableDiffusion, args: argparse.Namespace) -> list[Contestant]:
    contestants = [
        Contestant("ours, plain", functools.partial(our_picture, pipe, args)),
        Contestant("diffusers, eager", functools.partial(their_picture, pipe, diffusers_pipeline(pipe), args)),
    ]
    if args.opts != "none":
        row = Row(args.opts, tuple(parse_names(args.opts, pipe.device)))
        fast = speed.optimized(pipe, row)
        contestants.append(Contestant(f"ours, {args.opts}", functools.partial(our_picture, fast, args)))
    if args.compiled:
        theirs = diffusers_pipeline(pipe)
        theirs.unet = compiled(theirs.unet.to(memory_format=torch.channels_last), args)
        theirs.vae.to(memory_format=torch.channels_last)
        theirs.vae.decode = compiled(theirs.vae.decode, args)
        call = functools.partial(their_picture, pipe, theirs, args)
        contestants.append(Contestant(f"diffusers, {compiled_name(args)}", call))
    return contestants


def our_picture(pipe: StableDiffusion, args: argparse.Namespace) -> Tensor:
    options = {"steps": args.steps, "height": args.size, "width": args.size}
    images = pipe.generate([PROMPT] * args.batch, seed=list(range(SEED, SEED + args.batch)), **options)
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).float()


def diffusers_pipeline(pipe: StableDiffusion):
    """diffusers' pipeline over the same weights, with the sampler that is ours by default."""
    from diffusers import StableDiffusionPipeline

    from bench.reference import oracles

    theirs = StableDiffusionPipeline(
        vae=oracles.diffusers_vae(pipe.vae, pipe.config.vae),
        text_encoder=oracles.transformers_clip(pipe.clip, pipe.config.text).to(pipe.device),
        tokenizer=None,
        unet=oracles.diffusers_unet(pipe.unet, pipe.config.unet),
        scheduler=oracles.ddpm_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


@torch.inference_mode()
def their_picture(ours: StableDiffusion, theirs, args: argparse.Namespace) -> Tensor:
    """Ours tokenizes for both; everything after that is theirs."""
    tokens = ours.tokenizer(["", PROMPT], ours.config.text.max_length).to(ours.device)
    negative, positive = theirs.text_encoder(tokens).last_hidden_state.chunk(2)
    result = theirs(
        prompt_embeds=positive.repeat(args.batch, 1, 1),
        negative_prompt_embeds=negative.repeat(args.batch, 1, 1),
        num_inference_steps=args.steps,
        guidance_scale=7.5,
        height=args.size,
        width=args.size,
        generator=[torch.Generator("cpu").manual_seed(SEED + i) for i in range(args.batch)],
    )
    return torch.from_numpy(np.stack([np.asarray(image) for image in result.images])).float()


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
    parser.add_argument("--opts", default="none", metavar="A,B", help="with --pipeline: ours with these as well")
    parser.add_argument("--compiled", action="store_true", help="diffusers compiled and in channels_last as well")
    parser.add_argument("--compile-mode", default="reduce-overhead", help="torch.compile's (%(default)s)")
    parser.add_argument("--weights", default="random", metavar="FILE", help="a checkpoint, or SD 1.5 at random")
    parser.add_argument("--device", help="cuda or cpu (the best there is)")
    parser.add_argument("--dtype", choices=common.DTYPES, help="(float16 on CUDA, else float32)")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="with --pipeline (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pictures at a time (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/vs_diffusers"), metavar="DIR", help="(%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args = parse_arguments(argv)
    device = torch.device(args.device) if args.device else default_device()
    dtype = common.DTYPES[args.dtype] if args.dtype else common.default_dtype(device)
    pipe = common.load_pipeline(args.weights, device, dtype)
    try:
        contestants = (picture_contestants if args.pipeline else step_contestants)(pipe, args)
    except (ImportError, optimize.OptimizationError) as error:
        print(f"vs_diffusers.py: {error}", file=sys.stderr)
        return 2
    lines = lines_of(contestants, compete(contestants, device, args.rounds))
    what = f"{args.steps} steps, whole picture" if args.pipeline else "one guided step"
    common.print_table(f"{what}, {args.size}x{args.size}, batch {args.batch}, {common.device_name(device)}", lines)
    held = {"what": what, "size": args.size, "batch": args.batch}
    for line in lines:
        row = held | line | common.environment(device, dtype) | {"diffusers": common.version("diffusers")}
        common.append_csv(args.out / "vs_diffusers.csv", row)
    return 0


if __name__ == "__main__":
    sys.exit(main())

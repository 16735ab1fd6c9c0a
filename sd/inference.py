"""The command line: `python sd/inference.py --prompt "a lighthouse in a storm"`.

Only the standard library is imported before the arguments are read and checked, so that --help and a typing error
answer at once.
"""

import argparse
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent


def leave(signum: int, frame: object) -> None:
    """Ctrl-C while importing and loading, where C code turns KeyboardInterrupt into errors of its own."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, leave)
    # Python has put sd/ itself first, where config.py and images.py could shadow other packages.
    sys.path[0] = str(ROOT)

from sd import jobs  # noqa: E402
from sd.jobs import DEFAULTS, SAMPLERS, Job, Picture, UserError  # noqa: E402

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from sd.pipeline import StableDiffusion

DTYPES = ("float32", "float16", "bfloat16")


# ---- arguments


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """What is not given is None, so that a prompts file or a picture can fill it in before DEFAULTS do."""
    parser = jobs.OneLineParser(
        prog="inference.py",
        description="Draw pictures from prompts with Stable Diffusion 1.5.",
        epilog="Parameters of a .jsonl line win over these options, which win over those of --from-png.",
    )
    _add_sources(parser.add_argument_group("what to draw (one of these)"))
    _add_picture(parser.add_argument_group("the picture"))
    model = parser.add_argument_group("the model")
    add_model_options(model)
    model.add_argument("--save-quantized", type=Path, metavar="FILE", help="write the weights that --opt quantized")
    speed = parser.add_argument_group("speed")
    add_speed_options(speed)
    speed.add_argument(
        "--batch-size", type=int, metavar="N", help="pictures at once (what memory allows; halved when it runs out)"
    )
    _add_output(parser.add_argument_group("the files"))
    parser.set_defaults(again=None)
    return parser.parse_args(argv)


def _add_sources(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; repeat it for more pictures")
    group.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help='a prompt a line, or .jsonl: {"prompt": "a fox", "steps": 30, "seed": 1} with any of: '
        + ", ".join(jobs.CHECKS),
    )
    group.add_argument("--from-png", type=Path, metavar="FILE", help="draw a picture of this program again")
    group.add_argument("--list-opts", action="store_true", help="list the optimizations and leave")


def _add_picture(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--negative-prompt", metavar="TEXT", help="what to keep away from")
    group.add_argument("--steps", type=int, metavar="N", help=f"denoising steps, 1 to 1000 ({DEFAULTS['steps']})")
    group.add_argument(
        "--cfg-scale",
        type=float,
        metavar="X",
        help=f"guidance ({DEFAULTS['cfg_scale']}); 1 turns it off, twice as fast",
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="the first picture's, counting up (drawn at random; prompts file: 0)"
    )
    group.add_argument("--height", type=int, metavar="PIXELS", help="(the model's own: 512 for SD 1.5)")
    group.add_argument("--width", type=int, metavar="PIXELS", help="(the model's own)")
    group.add_argument("--num-images", type=int, metavar="N", help="pictures of each prompt (1)")
    group.add_argument("--sampler", choices=SAMPLERS, help=f"how to denoise ({DEFAULTS['sampler']})")
    group.add_argument("--init-image", metavar="FILE", help="start from this picture instead of noise")
    group.add_argument(
        "--strength", type=float, metavar="X", help=f"share of --init-image redrawn, 0 to 1 ({DEFAULTS['strength']})"
    )


def add_model_options(group: argparse._ArgumentGroup) -> None:
    """What `choose_checkpoint` and `load_pipeline` read."""
    group.add_argument(
        "--ckpt", type=Path, metavar="FILE", help=".safetensors or .ckpt ($SD_CKPT, then those in data/)"
    )
    group.add_argument("--ema", action="store_true", help="use the averaged weights of a file that holds both")
    group.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    group.add_argument("--dtype", choices=DTYPES, help="(float16 on CUDA, else float32)")
    group.add_argument("--load-quantized", type=Path, metavar="FILE", help="weights that --save-quantized wrote")


def add_speed_options(group: argparse._ArgumentGroup) -> None:
    """What `optimizations` reads."""
    group.add_argument(
        "--opt",
        metavar="NAMES",
        help="optimizations, comma-separated; --list-opts names them (cpu for large models on CPUs in fp32, else none)",
    )
    group.add_argument("--attention", metavar="BACKEND", help="naive, auto, flash, efficient, cudnn or math")
    group.add_argument(
        "--memory-budget", metavar="GB", help="on CPUs, in fp32: about what SD 1.5 may take at 512x512, or low: 5 (8)"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out",
        default="output.png",
        metavar="FILE",
        help="PNG (%(default)s); fields: "
        + ", ".join(f"{{{name}}}" for name in jobs.NAME_FIELDS)
        + ", as in out/{index:04}-{seed}.png; without one, several pictures become output-1.png, output-2.png, ...",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="of several pictures, draw again those that are there (a single one is always drawn)",
    )


def recall(args: argparse.Namespace) -> dict[str, object]:
    """Fill what the command line leaves open from the picture --from-png; returns all that the picture says."""
    from sd.images import read_parameters
    from sd.provenance import init_image_again

    recorded = read_parameters(args.from_png)
    wanted = {name: recorded.get(name) for name in (*DEFAULTS, "prompt", "seed")}
    known = jobs.checked(str(args.from_png), wanted)
    if "init_image" in known and args.init_image is None:
        found = init_image_again(known["init_image"], recorded.get("init_image_hash"), args.from_png.parent)
        known["init_image"] = found
    known["prompt"] = [known["prompt"]]
    for name in ("device", "dtype", "opt"):
        if isinstance(recorded.get(name), str):
            known[name] = recorded[name]
    if known.get("dtype") not in (None, *DTYPES):
        raise UserError(f"{args.from_png}: there is no dtype {known['dtype']}")
    if recorded.get("quantized") and not args.load_quantized:
        raise UserError(f"the picture was drawn with {recorded['quantized']}; name it with --load-quantized")
    args.again = None if args.batch_size else _place_in_batch(recorded.get("batch"))
    known["ema"] = args.ema or recorded.get("ema") is True
    for name, value in known.items():
        if getattr(args, name) in (None, False):
            setattr(args, name, value)
    return recorded


def _place_in_batch(recorded: object) -> tuple[int, int] | None:
    """(place, size) as a picture says it, if that makes sense."""
    match recorded:
        case [int(place), int(size)] if 0 <= place < size <= 1024:
            return place, size
    return None


# ---- what to draw


def plan_pictures(args: argparse.Namespace) -> list[Picture]:
    """All the pictures of the run and their files. Raises UserError for all that is wrong without knowing the model."""
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {args.batch_size}")
    if sum(map(bool, (args.prompt, args.prompts_file))) != 1:
        if args.save_quantized and not args.prompts_file:
            return []
        raise UserError("say what to draw: --prompt TEXT or --prompts-file FILE, one of them")
    given = {name: getattr(args, name) for name in (*DEFAULTS, "seed", "num_images")}
    shared = jobs.checked("", given)
    first_seed = shared.pop("seed", 0 if args.prompts_file else secrets.randbelow(2**32))
    planned = jobs.plan(_entries(args), shared, first_seed)
    files = jobs.output_files(args.out, planned, many=len(planned) > 1 or args.prompts_file is not None)
    return list(zip(planned, files, strict=True))


def _entries(args: argparse.Namespace) -> list[jobs.Entry]:
    if args.prompts_file:
        return jobs.read_prompts(args.prompts_file)
    return [jobs.Entry("", jobs.checked("", {"prompt": prompt})) for prompt in args.prompt]


def not_there_yet(pictures: list[Picture], args: argparse.Namespace, checkpoint: Path) -> list[Picture]:
    """Of several pictures, those to draw on a second run."""
    from sd.images import read_parameters
    from sd.provenance import fingerprint

    if args.overwrite or (len(pictures) == 1 and not args.prompts_file):
        return pictures
    seeds_are_random = args.seed is None and not args.prompts_file
    same = {"checkpoint_hash": fingerprint(checkpoint)}
    return jobs.left_to_draw(pictures, read_parameters, same, ignore=["seed"] if seeds_are_random else [])


# ---- the run


class Stopwatch:
    """Seconds by stage, in the order of their first appearance."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add({stage: time.perf_counter() - start})

    def add(self, seconds: dict[str, float]) -> None:
        for stage, more in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + more

    def __str__(self) -> str:
        return "  ".join(f"{stage} {seconds:.2f} s" for stage, seconds in self.seconds.items())


def run(args: argparse.Namespace) -> None:
    """Read, check, load, draw, save. Raises UserError for what the caller got wrong."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sd").setLevel(logging.INFO)
    if args.list_opts:
        list_optimizations()
        return
    watch = Stopwatch()
    recorded = recall(args) if args.from_png else {}
    pictures = plan_pictures(args)
    check_init_images(pictures)
    with watch("import"):
        import sd.pipeline  # noqa: F401
    checkpoint = choose_checkpoint(args, recorded)
    left = not_there_yet(pictures, args, checkpoint)
    if pictures and not left:
        print(f"all {len(pictures)} pictures are there already; --overwrite draws them again")
        return
    with watch("load"):
        pipe = load_pipeline(args, checkpoint)
    _let_interrupts_clean_up()
    if args.save_quantized:
        save_quantized(pipe, args.save_quantized)
    check_sizes(pipe, left)
    draw_all(pipe, left, args, facts(args, pipe, checkpoint), watch)
    print(watch)


def _let_interrupts_clean_up() -> None:
    """From here on files are written: Ctrl-C raises KeyboardInterrupt, so that a half-written one is removed."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def choose_checkpoint(args: argparse.Namespace, recorded: dict[str, object]) -> Path:
    """The weights' file; for --from-png the one that the picture was drawn with."""
    from sd.pipeline import DATA, find_checkpoint
    from sd.provenance import checkpoint_again

    if args.ckpt or not recorded.get("checkpoint_hash"):
        return args.ckpt or find_checkpoint()
    name = Path(str(recorded.get("checkpoint"))).name
    return checkpoint_again(name, recorded["checkpoint_hash"], (find_checkpoint(), DATA / name))


def load_pipeline(args: argparse.Namespace, checkpoint: Path) -> "StableDiffusion":
    import torch

    from sd.pipeline import StableDiffusion

    device = check_device(args.device)
    pipe = StableDiffusion.load(checkpoint, device, args.dtype and getattr(torch, args.dtype), ema=args.ema)
    if args.load_quantized:
        from sd.quantize import load_quantized

        load_quantized(pipe, args.load_quantized)
    if names := optimizations(args, pipe):
        from sd import optimize

        optimize.apply(pipe, optimize.parse(names, pipe.device))
    return pipe


def save_quantized(pipe: "StableDiffusion", path: Path) -> None:
    from sd import quantize

    quantize.save_quantized(pipe, path)


def facts(args: argparse.Namespace, pipe: "StableDiffusion", checkpoint: Path) -> dict[str, object]:
    """What a picture's PNG says of the model and the machine; `recall` reads it."""
    import torch

    from sd.provenance import fingerprint

    known = {
        "model": pipe.config.name,
        "checkpoint": checkpoint.name,
        "checkpoint_hash": fingerprint(checkpoint),
        "ema": args.ema,
        "quantized": args.load_quantized and args.load_quantized.name,
        "opt": ",".join(getattr(pipe, "optimizations", [])),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": str(pipe.device),
        "torch": torch.__version__,
    }
    return {name: value for name, value in known.items() if value is not None}


def check_device(name: str | None) -> "torch.device | None":
    """None for the default, else a torch.device that is really there."""
    import torch

    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device: {name!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return device


def check_init_images(pictures: Sequence[Picture]) -> None:
    """That each is there and of a kind that can be read; the pixels are read when its turn comes."""
    if not (named := {job.init_image: job.where for job, _ in reversed(pictures) if job.init_image}):
        return
    from sd.images import check_readable

    for name, where in named.items():
        try:
            check_readable(name)
        except ValueError as error:
            raise UserError(f"{where or '--init-image'}: {error}") from None


def check_sizes(pipe: "StableDiffusion", pictures: Sequence[Picture]) -> None:
    side = pipe.config.image_size
    for job, _ in pictures:
        try:
            pipe.config.check_size(job.height or side, job.width or side)
        except ValueError as error:
            raise UserError(f"{job.where}: {error}" if job.where else str(error)) from None


def draw_all(
    pipe: "StableDiffusion",
    pictures: Sequence[Picture],
    args: argparse.Namespace,
    facts: dict[str, object],
    watch: Stopwatch,
) -> None:
    """Draw in batches and write each picture as soon as its batch is done. facts: what each PNG says of the model."""
    from sd import memory
    from sd.images import save_png

    def make_room(size: int) -> None:
        memory.release(pipe.device)
        print(f"out of memory; going on with {size} at once", file=sys.stderr)

    with Progress(len(pictures)) as progress:
        for group in jobs.groups(pictures):
            files = dict(group)
            drawing = Drawing(pipe, group[0][0], progress, watch, args.again if len(pictures) == 1 else None)
            size = args.batch_size or drawing.auto_batch_size()
            for batch, drawn in jobs.draw_in_batches(
                list(files), drawing.draw, size, memory.is_out_of_memory, make_room
            ):
                for job, image in zip(batch, drawn, strict=True):
                    save_png(image, files[job], {**image.info, **facts})
                    progress.picture(f"{files[job]}  seed {job.seed}")


class Drawing:
    """Draws the jobs of one group, which share the settings of `like`.

    again: a place in a batch, (2, 8) for the third of eight. The one job is drawn there, because a kernel may round
    differently in batches of another size.
    """

    def __init__(
        self, pipe: "StableDiffusion", like: Job, progress: "Progress", watch: Stopwatch, again: tuple[int, int] | None
    ):
        self.pipe = pipe
        self.like = like
        self.progress = progress
        self.watch = watch
        self.again = again

    def auto_batch_size(self) -> int:
        from sd.memory import pictures_at_once

        side = self.pipe.config.image_size
        height, width = self.like.height or side, self.like.width or side
        return pictures_at_once(self.pipe.config, height, width, self.pipe.dtype, self.pipe.device)

    def draw(self, batch: Sequence[Job]) -> "list[Image.Image]":
        """The pictures, with all that their PNGs will say of them in `info`."""
        if self.again:
            place, size = self.again
            return [self._generate(list(batch) * size)[place]]
        return self._generate(batch)

    def _generate(self, batch: Sequence[Job]) -> "list[Image.Image]":
        like = self.like
        images = self.pipe.generate(
            [job.prompt for job in batch],
            [job.negative_prompt for job in batch],
            like.steps,
            like.cfg_scale,
            [job.seed for job in batch],
            like.height,
            like.width,
            like.sampler,
            self.init_image,
            like.strength,
            on_step=self.progress.step,
        )
        self.watch.add(self.pipe.times)
        for place, image in enumerate(images):
            image.info |= {**self.origin, "batch": [place, len(images)]}
        return images

    @cached_property
    def init_image(self) -> "Image.Image | None":
        from sd.images import read_rgb

        return read_rgb(self.like.init_image) if self.like.init_image else None

    @cached_property
    def origin(self) -> dict[str, str]:
        from sd.provenance import fingerprint

        name = self.like.init_image
        return {"init_image": name, "init_image_hash": fingerprint(name)} if name else {}


class Progress:
    """Bars on stderr: the steps of a batch and, over several pictures, those that are done. File names on stdout."""

    def __init__(self, pictures: int):
        self.pictures = pictures
        self.bars: dict[str, object] = {}

    def __enter__(self) -> "Progress":
        if self.pictures > 1:
            self._bar("pictures", self.pictures, unit="picture")
        return self

    def __exit__(self, *error: object) -> None:
        for bar in reversed(self.bars.values()):
            bar.close()

    def step(self, step: int, steps: int, latents: object) -> None:
        """The callback for `generate`: the bar appears with the first step of each batch."""
        if step == 1 and "denoise" in self.bars:
            self.bars["denoise"].reset(steps)
        self._bar("denoise", steps, unit="it", leave=self.pictures == 1).update()

    def picture(self, line: str) -> None:
        from tqdm import tqdm

        tqdm.write(line, file=sys.stdout)
        if "pictures" in self.bars:
            self.bars["pictures"].update()

    def _bar(self, name: str, total: int, **options: object):
        from tqdm import tqdm

        if name not in self.bars:
            self.bars[name] = tqdm(total=total, desc=name, **options)
        return self.bars[name]


# ---- optimizations


LARGE = 300_000_000  # parameters of a UNet from which preparing kernels and weights is paid back by one picture
OTHERWISE = 4.6  # gigabytes that SD 1.5 takes at 512x512 beside what Winograd's kernels take more than the weights


def optimizations(args: argparse.Namespace, pipe: "StableDiffusion") -> str:
    """--opt, --attention and --memory-budget as one list of names; without any, what suits the model and the device."""
    import torch

    exact = pipe.device.type == "cpu" and pipe.dtype == torch.float32 and not args.load_quantized
    large = sum(weight.numel() for weight in pipe.unet.parameters()) >= LARGE
    given = [args.opt, args.attention and f"attention={args.attention}"]
    if given == [None, None] and exact and large:
        given = ["cpu"]
    if args.memory_budget is not None:
        given.append(memory_options(args.memory_budget))
    return ",".join(filter(None, given))


def memory_options(budget: str) -> str:
    """What keeps SD 1.5 at 512x512 within a budget, "low" or in GB: 4.3 of them are its weights."""
    try:
        gigabytes = 5.0 if budget == "low" else float(budget)
    except ValueError:
        gigabytes = 0.0
    if not 4.5 <= gigabytes < 1000:
        raise UserError(f"--memory-budget must be low, or gigabytes from 4.5 on, not {budget}")
    return f"winograd={max(0.0, gigabytes - OTHERWISE):.2f},page-out"


def list_optimizations() -> None:
    from sd.optimize import PRESETS, REGISTRY

    rows = [("NAME", "", "NEEDS", "GAIN", "WHAT IT DOES")]
    for o in REGISTRY.values():
        name = f"{o.name}={o.hint}" if o.hint else o.name
        rows.append((name, "exact" if o.exact else "approximate", o.needs, o.gain, o.summary))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\npresets: {', '.join(PRESETS)}")


# ---- the end


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_arguments(argv)))


def exit_code(action: Callable[[], None]) -> int:
    """0 when all is done, 2 after one line on stderr for what the caller can put right, 130 after Ctrl-C."""
    try:
        action()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        return fail(f"{error.name} is not installed: pip install -r {ROOT / 'requirements.txt'}")
    except (UserError, ValueError, OSError, MemoryError) as error:
        return fail(str(error) or type(error).__name__)
    except RuntimeError as error:
        from sd.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        hint = "out of memory with one picture at once: a smaller --height and --width, or --dtype float16"
        return fail(f"{hint} ({str(error).splitlines()[0]})")
    return 0


def fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())

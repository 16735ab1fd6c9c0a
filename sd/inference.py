"""The command line: `python sd/inference.py --prompt "a lighthouse in a storm"`.

Only the standard library is imported before the arguments are read, so that --help and a typing error answer at once.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLERS = ("ddpm", "ddim")
DTYPES = ("float32", "float16", "bfloat16")


class UserError(Exception):
    """Something that the person at the keyboard can put right: printed in one line, exit code 2."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="inference.py", description="Draw pictures from prompts with Stable Diffusion 1.5."
    )
    picture = parser.add_argument_group("the picture")
    picture.add_argument("--prompt", required=True, metavar="TEXT", help="what to draw")
    picture.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to keep away from")
    picture.add_argument("--steps", type=int, default=50, metavar="N", help="denoising steps, 1 to 1000 (%(default)s)")
    picture.add_argument(
        "--cfg-scale",
        type=float,
        default=7.5,
        metavar="X",
        help="guidance (%(default)s); 1 turns it off, twice as fast",
    )
    picture.add_argument("--seed", type=int, metavar="N", help="one seed, one picture (drawn at random)")
    picture.add_argument("--height", type=int, metavar="PIXELS", help="(the model's own: 512 for SD 1.5)")
    picture.add_argument("--width", type=int, metavar="PIXELS", help="(the model's own)")
    picture.add_argument("--num-images", type=int, default=1, metavar="N", help="how many, seeds counting up (1)")
    picture.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="how to denoise (%(default)s)")
    picture.add_argument("--init-image", type=Path, metavar="FILE", help="start from this picture instead of noise")
    picture.add_argument(
        "--strength", type=float, default=0.8, metavar="X", help="share of --init-image redrawn, 0 to 1 (%(default)s)"
    )
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--ckpt", type=Path, metavar="FILE", help=".safetensors or .ckpt ($SD_CKPT, then those in data/)"
    )
    model.add_argument("--ema", action="store_true", help="use the averaged weights of a file that holds both")
    model.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    model.add_argument("--dtype", choices=DTYPES, help="(float16 on CUDA, else float32)")
    parser.add_argument("--out", type=Path, default=Path("output.png"), metavar="FILE", help="PNG (%(default)s)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Load, draw, save. Raises UserError for what the caller got wrong."""
    import_started = time.perf_counter()
    import torch

    from sd.images import save_png
    from sd.pipeline import StableDiffusion

    imported = time.perf_counter()
    files = output_files(args.out, args.num_images)
    init_image = read_image(args.init_image) if args.init_image else None
    device = check_device(torch, args.device)
    pipe = StableDiffusion.load(args.ckpt, device, args.dtype and getattr(torch, args.dtype), ema=args.ema)
    loaded = time.perf_counter()
    with progress_bar() as on_step:
        images = pipe.generate(
            [args.prompt] * args.num_images,
            args.negative_prompt,
            args.steps,
            args.cfg_scale,
            args.seed,
            args.height,
            args.width,
            args.sampler,
            init_image,
            args.strength,
            on_step=on_step,
        )
    for file, image in zip(files, images, strict=True):
        save_png(
            image, file, {**image.info, "model": pipe.config.name, "dtype": str(pipe.dtype).removeprefix("torch.")}
        )
        print(f"{file}  seed {image.info['seed']}")
    times = {"import": imported - import_started, "load": loaded - imported, **pipe.times}
    print("  ".join(f"{stage} {seconds:.2f} s" for stage, seconds in times.items()))


def output_files(out: Path, count: int) -> list[Path]:
    """Where the pictures go: out itself, or out-1, out-2, ... Raises UserError if nothing can be written there."""
    if not out.parent.is_dir():
        raise UserError(f"--out: there is no folder {out.parent}")
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; name a .png file")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"--out: {out.parent} is not writable")
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(1, count + 1)]


def read_image(path: Path):
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--init-image: {path} cannot be read as a picture ({error})") from error


def check_device(torch, name: str | None):
    """None for the default, else a torch.device that is really there."""
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device: {name!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return device


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, object], None]]:
    """The callback for `generate`: a tqdm bar that appears with the first step."""
    from tqdm import tqdm

    bar = None

    def on_step(step: int, steps: int, latents: object) -> None:
        nonlocal bar
        bar = bar or tqdm(total=steps, unit="it", desc="denoise")
        bar.update()

    try:
        yield on_step
    finally:
        if bar is not None:
            bar.close()


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.num_images < 1:
        return fail(f"--num-images must be at least 1, not {args.num_images}")
    try:
        run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (UserError, ValueError, OSError, MemoryError) as error:
        return fail(str(error) or type(error).__name__)
    return 0


def fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    # Python has put sd/ itself first, where config.py and images.py could shadow other packages.
    sys.path[0] = str(ROOT)
    raise SystemExit(main())

"""The command line: `python sd/inference.py --prompt "a red apple"`.

Only the standard library is imported before the arguments are read, so that --help and a typing error answer at once.
"""

import argparse
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

ROOT = Path(__file__).resolve().parent.parent
LONGEST_LINE = 2000  # of an error: what it quotes may be a file's, or megabytes
RANDOM_SEED = -1  # what other programs call no seed


def leave(signum: int, frame: object) -> None:
    """Ctrl-C while importing and loading, where C code turns KeyboardInterrupt into errors of its own."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, leave)
    # Python has put sd/ itself first, where config.py and images.py could shadow other packages.
    sys.path[0] = str(ROOT)

from sd import samplers  # noqa: E402
from sd.pictures import drawing, loras, parameters, vocabulary  # noqa: E402
from sd.pictures.controls import check_controls, load_controls  # noqa: E402
from sd.pictures.files import DEFAULT, NAME_FIELDS, Pictures  # noqa: E402
from sd.pictures.model import ModelChoice, add_model_options, add_speed_options  # noqa: E402
from sd.pictures.parameters import PARAMETERS, OneLineParser, UserError  # noqa: E402
from sd.pictures.plan import Job, Picture  # noqa: E402
from sd.pictures.run import Run, check_init_images, not_there_yet, pictures_of, recalled  # noqa: E402
from sd.pictures.saving import STDOUT  # noqa: E402
from sd.pictures.streams import steady  # noqa: E402
from sd.printable import Printable, printable  # noqa: E402

if TYPE_CHECKING:
    from sd.pipeline import StableDiffusion

Options = TypeVar("Options")
log = logging.getLogger(f"sd.{__name__}" if __name__ == "__main__" else __name__)


# ---- arguments


def parse_arguments(argv: list[str] | None = None) -> tuple[Run, ModelChoice]:
    """What is not given is None, so that a prompts file or a picture can fill it in before the defaults do."""
    args = _parser().parse_args(argv)
    given = {one.name: getattr(args, one.name) for one in parameters.flags()}
    given = parameters.fast(given) if args.fast else given
    if given["seed"] == RANDOM_SEED:
        given["seed"] = secrets.randbelow(2**32)
    return options(Run, args, parameters=given, place=None), options(ModelChoice, args)


def options(kind: type[Options], args: argparse.Namespace, **others: object) -> Options:
    """A dataclass from the options that it names and the others."""
    return kind(**{one.name: getattr(args, one.name) for one in fields(kind) if one.name not in others}, **others)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="inference.py",
        description="Draw pictures from prompts with Stable Diffusion 1.5.",
        epilog="Parameters of a .jsonl line win over these options, which win over those of --from-png.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    _add_sources(parser.add_argument_group("what to draw (one of these)").add_argument)
    picture = parser.add_argument_group("the picture").add_argument
    parameters.add_options(picture)
    fast = ", ".join(f"--{name} {value}" for name, value in parameters.FAST.items())
    picture("--fast", action="store_true", help=f"{fast}, where these are not given")
    model = parser.add_argument_group("the model").add_argument
    add_model_options(model)
    model("--save-quantized", type=Path, metavar="FILE", help="write the weights that --opt quantized")
    speed = parser.add_argument_group("speed").add_argument
    add_speed_options(speed)
    speed("--explain", action="store_true", help="print what runs in each module, and which optimization put it there")
    speed("--batch-size", type=int, metavar="N", help="pictures at once (what memory allows; halved when it runs out)")
    _add_output(parser.add_argument_group("the files").add_argument)
    _add_watching(parser.add_argument_group("to look at").add_argument)
    return parser


def _add_sources(add: Callable[..., object]) -> None:
    add("-p", "--prompt", action="append", metavar="TEXT", help="a prompt; repeat it for more pictures")
    add(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help='a prompt a line, or JSON: {"prompt": "a fox", "steps": 30, "seed": 1} with any of: '
        + ", ".join(PARAMETERS),
    )
    add("--from-png", type=Path, metavar="FILE", help="draw a picture of this program again")
    add("--inspect", type=Path, metavar="FILE", help="say what a file of weights is and how to use it, and leave")
    add("--list-opts", action="store_true", help="list the optimizations and leave")
    add("--list-samplers", action="store_true", help="list the samplers and schedules and leave")


def _add_output(add: Callable[..., object]) -> None:
    add(
        "-o",
        "--out",
        metavar="FILE",
        help=f"PNG, JPEG or WebP, - for standard output ({DEFAULT}, or the next output-N.png that is free); fields: "
        + ", ".join(f"{{{name}}}" for name in NAME_FIELDS)
        + ", as in out/{index:04}-{seed}.png; without one, several pictures become output-1.png, output-2.png, ...",
    )
    add(
        "--overwrite",
        action="store_true",
        help=f"draw again those that are there (a single one that --out names is always drawn), {DEFAULT} too",
    )


def _add_watching(add: Callable[..., object]) -> None:
    add("--show", action="store_true", help="show each picture in the terminal when it is drawn")
    add(
        "--preview",
        type=int,
        metavar="N",
        help="show it every N steps in the terminal (kitty, iTerm2, sixel or blocks)",
    )
    add("--preview-file", type=Path, metavar="FILE", help="write it there as often, too")
    add("--preview-decoder", type=Path, metavar="FILE", help="TAESD's decoder, in place of a linear map of the latents")
    add("--save-steps", type=Path, metavar="FILE", help="all steps as an animation: .webp, .gif or .png")


FIRST_SCREEN = """\
Stable Diffusion 1.5: a prompt becomes a picture.

  python sd/inference.py --prompt "a blue fox on a yellow background"
  python sd/inference.py --prompt "a castle" --fast --num-images 4 --out "castle-{seed}.png"
  python sd/inference.py --from-png output.png --opt kv-cache,deepcache=3 --explain

Without other weights it draws with the demo model that is in here: 1,100 things as drawings.
python sd/download.py fetches Stable Diffusion 1.5 (4.3 GB); --ckpt FILE names any other model.

--help lists all options, --list-opts what makes it faster, --list-samplers the samplers."""
"""What somebody sees who types no options."""


# ---- the run


def run(asked: Run, model: ModelChoice) -> None:
    """Read, check, load, draw, save. Raises UserError for what the caller got wrong."""
    start_log()
    logging.getLogger("sd").setLevel(logging.INFO)
    if told := "\n\n".join(_answers(asked)):
        print(told)
        return
    out = sys.stderr if asked.out == STDOUT else sys.stdout
    watch = drawing.Stopwatch()
    asked, model, recorded = recalled(asked, model) if asked.from_png else (asked, model, {})
    pictures = pictures_of(asked)
    jobs = pictures.jobs.firsts if pictures else ()
    check_files(jobs, model, recorded)
    with watch("import"):
        import sd.pipeline  # noqa: F401
    if __name__ == "__main__":  # who calls this from a program of their own keep their signals
        from sd.checkpoints.shrinking import on_bus_error

        on_bus_error(leave_at_once)
    checkpoint = model.checkpoint(recorded)
    windows, count = left_of(pictures, asked, checkpoint, model)
    if pictures and not count:
        print(f"all {len(pictures)} pictures are there already; --overwrite draws them again")
        if not asked.explain:
            return
    with watch("load"):
        pipe = model.load(checkpoint)
    if asked.explain:
        print(pipe.explain(), file=out)
    _let_interrupts_clean_up()
    if asked.save_quantized:
        save_quantized(pipe, asked.save_quantized)
    drawing.check_sizes(pipe, jobs)
    load_controls(pipe, jobs)
    if told := vocabulary.notice(pipe, jobs):
        log.warning(told)
    facts, at_once = model.facts(pipe, checkpoint), (asked.batch_size, asked.place)
    how = drawing.Draw(facts, asked.save, out, asked.watching, *at_once, model.lora_dir)
    failed = drawing.draw_all(pipe, windows, count, how, watch)
    print(watch, file=out)
    if failed and not asked.prompts_file:  # all start from the same
        raise UserError(failed[0])
    if failed:
        raise SomeFailedError(failed)


def start_log() -> None:
    """Lines on stderr; names and files that they speak of may hold what a terminal would obey."""
    handler = logging.StreamHandler()
    handler.setFormatter(Printable("%(message)s"))
    logging.basicConfig(handlers=[handler])


def check_files(jobs: Sequence[Job], model: ModelChoice, recorded: Mapping[str, object]) -> None:
    """All that is named, before anything is loaded. recorded: what --from-png says. Raises UserError or ValueError."""
    check_init_images(jobs)
    check_controls(jobs)
    loras.check(jobs, model.lora_dir)
    loras.check_again(jobs, recorded, model.lora_dir)
    model.check_files()


def left_of(
    pictures: Pictures, asked: Run, checkpoint: Path, model: ModelChoice
) -> tuple[Iterator[list[Picture]], int]:
    """Those that are not there yet, some at a time, and how many there may be: the first are known."""
    same = model.same(checkpoint)
    several = len(pictures) > 1 or asked.prompts_file is not None
    there = 0
    windows = pictures.windows()
    for window in windows:
        left = not_there_yet(window, asked, same, several)
        there += len(window) - len(left)
        if left:
            rest = (not_there_yet(window, asked, same, several) for window in windows)
            return chain([left], rest), len(pictures) - there
    return iter(()), 0


def _let_interrupts_clean_up() -> None:
    """From here on files are written: Ctrl-C raises KeyboardInterrupt, so that a half-written one is removed."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def save_quantized(pipe: "StableDiffusion", path: Path) -> None:
    from sd.optimizations import quantized_files

    quantized_files.save_quantized(pipe, path)


def version() -> str:
    """That of the checkout, or of the package that is installed."""
    import importlib.metadata
    import tomllib

    if (project := ROOT / "pyproject.toml").is_file():
        return tomllib.loads(project.read_text())["project"]["version"]
    return importlib.metadata.version("sd")


def _answers(asked: Run) -> Iterator[str]:
    """To what is asked for in place of pictures."""
    if asked.version:
        yield version()
    if asked.inspect:
        from sd.inspection import inspect

        yield inspect(asked.inspect)
    if asked.list_opts:
        from sd import optimizations

        yield optimizations.listing()
    if asked.list_samplers:
        yield samplers.listing()


# ---- the end


class SomeFailedError(Exception):
    """Some pictures cannot be drawn, and the others are: a line for each."""

    def __init__(self, lines: Sequence[str]):
        super().__init__("; ".join(lines))
        self.lines = lines


def main(argv: list[str] | None = None) -> int:
    if not (sys.argv[1:] if argv is None else argv):
        print(FIRST_SCREEN, file=sys.stderr)
        return 2
    return exit_code(lambda: run(*parse_arguments(argv)))


def exit_code(action: Callable[[], None]) -> int:
    """0 when all is done, 2 after one line on stderr for what the caller can put right, 130 after Ctrl-C."""
    try:
        action()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        return fail(f"{error.name} is not installed: pip install -r {ROOT / 'requirements.txt'}")
    except SomeFailedError as error:
        for line in error.lines:
            fail(line)
        return 1
    except OSError as error:
        named = error.filename is not None and error.strerror
        return fail(f"{error.filename}: {error.strerror}" if named else str(error) or type(error).__name__)
    except (UserError, ValueError, MemoryError) as error:
        return fail(str(error) or type(error).__name__)
    except RuntimeError as error:
        if not drawing.is_out_of_memory(error):
            raise
        hint = "out of memory with one picture at once: a smaller --height and --width, or --dtype float16"
        return fail(f"{hint} ({str(error).splitlines()[0]})")
    return 0


def fail(message: str) -> int:
    """One line, without the terminal codes that names and files may hold."""
    line = one_line(message)
    print(f"error: {line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + '...'}", file=sys.stderr)
    return 2


def one_line(message: str) -> str:
    return " ".join(printable(message).split())


def leave_at_once(message: str) -> NoReturn:
    """From a thread that cannot go on."""
    with suppress(OSError):
        os.write(2, f"\nerror: {one_line(message)}\n".encode())  # on a line of its own, below a bar
    os._exit(2)


if __name__ == "__main__":
    steady()
    raise SystemExit(main())

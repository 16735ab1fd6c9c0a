"""The ladder: for each optimization, the time that it saves and what it costs the picture, in one run.

    python bench/ladder.py --opts exact                       # one more optimization a row
    python bench/ladder.py --opts fast --mode leave-one-out   # all of them, then all but one
    python bench/ladder.py --base exact --opts int8-dynamic,float8 --mode alone
    python bench/ladder.py --gains                            # no ladder: gains.json from bench/results

Row 0 is attention spelled out, row 1 the plain pipeline; every row is timed in pairs with row 1, in the same process.
Besides optimizations, --opts takes `steps=N` and `sampler=NAME`. Rows that stand in OUT are not measured again.
Exit code 1: a row failed, or compiled when it should not have. 75: --budget ended first; the same command goes on.
"""

import argparse
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common, fidelity, gains, plots, report, speed
from bench.compilation import Watch
from bench.fidelity import Drawing, Fidelity
from bench.rungs import PLAIN, RERUN, Row, Settings, parse_names, rows_of
from bench.speed import Bench, Speed
from sd.optimizations import OptimizationError
from sd.pipeline import StableDiffusion, default_device, find_checkpoint

UNFINISHED = 75
SPEED_FIELDS = [f.name for f in fields(Speed)]
FIDELITY_FIELDS = [f.name for f in fields(Fidelity) if f.name != "errors"]
log = logging.getLogger("ladder")


class Judge:
    """Draws on trained weights, and compares with what the plain fp32 pipeline draws from the same noise."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.plain = StableDiffusion.load(settings.trained, settings.device, settings.dtype)

    @cached_property
    def reference(self) -> Drawing:
        full = StableDiffusion.load(self.settings.trained, self.settings.device, torch.float32)
        with common.full_precision():
            return self.draw(full, PLAIN)

    @cached_property
    def plain_drawing(self) -> Drawing:
        return self.draw(self.plain, PLAIN)

    def draw(self, pipe: StableDiffusion, row: Row) -> Drawing:
        return fidelity.draw(pipe, **row.sampling(self.settings.fidelity_steps, self.settings.sampler))

    def measure(self, row: Row) -> Fidelity:
        """Raises what the row's optimizations raise. RERUN is the plain pipeline against itself: the noise floor."""
        if row == RERUN:
            return fidelity.compare(self.draw(self.plain, PLAIN), self.plain_drawing)
        if row == PLAIN:
            return fidelity.compare(self.plain_drawing, self.reference)
        Watch()  # forgets what was compiled for the row before
        return fidelity.compare(self.draw(speed.optimized(self.plain, row), row), self.reference)


class Ladder:
    """Measures rows into the files of a folder: speed.csv, fidelity.csv and steps.csv (the error after each step)."""

    def __init__(self, out: Path, settings: Settings, budget: float = float("inf")):
        self.out = out
        self.settings = settings
        self.environment = common.environment(settings.device, settings.dtype)
        self.deadline = time.monotonic() + budget
        self.slowest = 0.0

    def measure_speed(self, rows: Sequence[Row]) -> bool:
        """Time the rows that are not in speed.csv yet; False if the budget ended first."""
        held = self.settings.speed_columns()
        if not (missing := list(self._missing("speed.csv", rows, held))):
            return True
        bench = Bench(self.settings)
        for row in missing:
            if not self._in_time(row):
                return False
            self._record("speed.csv", row, held, SPEED_FIELDS, lambda row: speed.measure(bench, row))
        return True

    def measure_fidelity(self, rows: Sequence[Row]) -> bool:
        """Compare the rows that are not in fidelity.csv yet; False if the budget ended first."""
        held = self.settings.fidelity_columns()
        if not (missing := list(self._missing("fidelity.csv", rows, held))):
            return True
        judge = Judge(self.settings)
        for row in missing:
            if not self._in_time(row):
                return False
            result = self._record("fidelity.csv", row, held, FIDELITY_FIELDS, judge.measure)
            self._record_steps(row, result.errors if result else [])
        return True

    def _missing(self, name: str, rows: Sequence[Row], held: Mapping) -> Iterator[Row]:
        lines = common.read_csv(self.out / name)
        found = ((row, self._find(lines, row, held)) for row in rows)
        return (row for row, line in found if not line or crashed(line["error"]))

    def _find(self, lines: Sequence[dict[str, str]], row: Row, held: Mapping) -> dict[str, str]:
        """The row's latest line in a file, measured under these settings on this device; or nothing."""
        wanted = {"opts": row.key, "dtype": self.environment["dtype"], "device": self.environment["device"], **held}
        matching = (x for x in reversed(lines) if all(x.get(key) == str(value) for key, value in wanted.items()))
        return next(matching, {})

    def _in_time(self, row: Row) -> bool:
        """Whether the device still answers, and the budget has room for a row as slow as the slowest so far."""
        try:
            common.synchronize(self.settings.device)
        except RuntimeError as error:
            log.warning("start again: the device was lost before row %r: %s", row.key, error)
            return False
        if time.monotonic() + self.slowest <= self.deadline:
            return True
        log.warning("the budget ends before row %r", row.key)
        return False

    def _record(self, name: str, row: Row, held: Mapping, columns: Sequence[str], measure: Callable):
        """Measure a row and write its line, with the reason if it cannot be measured. Returns what was measured."""
        log.info("%s: %s", name.removesuffix(".csv"), row.key)
        started = time.monotonic()
        result, error = attempt(measure, row)
        measured = {column: common.cell(getattr(result, column)) if result else "" for column in columns}
        line = {"row": row.label, "opts": row.key, "exact": int(row.exact), **held, **measured, "error": error}
        common.append_csv(self.out / name, line | self.environment)
        self.slowest = max(self.slowest, time.monotonic() - started)
        return result

    def _record_steps(self, row: Row, errors: Sequence[float]) -> None:
        for step, error in enumerate(errors, start=1):
            line = {"opts": row.key, "step": step, "error": common.cell(error), **self.settings.fidelity_columns()}
            common.append_csv(self.out / "steps.csv", line | self.environment)

    def results(self, rows: Sequence[Row]) -> list[dict[str, str]]:
        """Speed and fidelity of each row side by side, as they stand in the files."""
        times, looks = (common.read_csv(self.out / name) for name in ("speed.csv", "fidelity.csv"))
        return [self._joined(row, times, looks) for row in rows]

    def _joined(self, row: Row, times: list[dict[str, str]], looks: list[dict[str, str]]) -> dict[str, str]:
        time_ = self._find(times, row, self.settings.speed_columns())
        look = self._find(looks, row, self.settings.fidelity_columns())
        held = self.settings.speed_columns() | self.settings.fidelity_columns()
        line = {"row": row.label, "opts": row.key, "exact": int(row.exact), **held}
        line |= {column: time_.get(column, "") for column in SPEED_FIELDS}
        line |= {column: look.get(column, "") for column in FIDELITY_FIELDS}
        line["error"] = "; ".join(dict.fromkeys(x["error"] for x in (time_, look) if x.get("error")))
        line |= {column: (time_ or look).get(column, value) for column, value in self.environment.items()}
        return {column: str(value) for column, value in line.items()}


def attempt(measure: Callable, row: Row) -> tuple:
    """What was measured, or one line saying why not. A row that cannot run is a result, not the end of the ladder."""
    try:
        return measure(row), ""
    except Exception as error:
        if not isinstance(error, OptimizationError):
            traceback.print_exc()
        reason = next(iter(f"{type(error).__name__}: {error}".splitlines()))
        log.warning("row %r: %s", row.key, reason)
        return None, reason[:200].replace("; ", ", ")


def crashed(error: str) -> bool:
    """Whether a row's error is a failure. An OptimizationError says what this device or combination cannot have."""
    return any(not part.startswith("OptimizationError") for part in error.split("; ") if part)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    description, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--opts", default="exact", metavar="A,B", help="optimizations, or a preset (%(default)s)")
    parser.add_argument("--base", default="none", metavar="A,B", help="what every row after row 1 has (%(default)s)")
    parser.add_argument("--without", default="none", metavar="A,B", help="left out of --base and --opts")
    parser.add_argument("--mode", choices=("cumulative", "leave-one-out", "alone"), default="cumulative")
    parser.add_argument("--no-naive", action="store_true", help="without row 0, which takes longest")
    parser.add_argument("--out", type=Path, default=Path("out/ladder"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--name", default="ladder", help="of the table and the plot in DIR (%(default)s)")
    parser.add_argument("--measure", default="speed,fidelity", help="one of these or both (%(default)s)")
    parser.add_argument("--weights", default="random", metavar="FILE", help="timed weights: a checkpoint, or random")
    parser.add_argument("--trained", default="auto", metavar="FILE", help="weights for fidelity (those there are)")
    parser.add_argument("--device", help="cuda or cpu (the best there is)")
    parser.add_argument("--dtype", choices=common.DTYPES, help="(float16 on CUDA, else float32)")
    parser.add_argument("--size", type=int, default=512, metavar="PIXELS", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="(%(default)s)")
    parser.add_argument("--fidelity-steps", type=int, default=50, metavar="N", help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pictures at a time (%(default)s)")
    parser.add_argument("--sampler", default="ddpm", help="(%(default)s)")
    parser.add_argument("--pairs", type=int, default=10, metavar="N", help="pictures timed a row (%(default)s)")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="start no row after this")
    parser.add_argument("--gains", action="store_true", help="measure nothing: write gains.json from bench/results")
    parser.add_argument("--update-gains", action="store_true", help="put what is measured into gains.json")
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> Settings:
    device = torch.device(args.device) if args.device else default_device()
    return Settings(
        device=device,
        dtype=common.DTYPES[args.dtype] if args.dtype else common.default_dtype(device),
        weights=args.weights,
        size=args.size,
        steps=args.steps,
        batch=args.batch,
        sampler=args.sampler,
        pairs=args.pairs,
        trained=trained_weights(args),
        fidelity_steps=args.fidelity_steps,
    )


def trained_weights(args: argparse.Namespace) -> str | None:
    """The checkpoint that fidelity is measured on: the one named, the one timed, or the one in data/."""
    if args.trained != "auto":
        return args.trained
    if args.weights not in ("random", "tiny"):
        return args.weights
    try:
        return str(find_checkpoint())
    except FileNotFoundError:
        log.warning("no trained weights: fidelity is not measured")
        return None


def run(ladder: Ladder, rows: Sequence[Row], what: Sequence[str], name: str = "ladder") -> int:
    """Measure, write NAME.csv and NAME.svg, print. Returns the exit code."""
    complete = ladder.measure_speed(rows) if "speed" in what else True
    if complete and "fidelity" in what and ladder.settings.trained:
        complete = ladder.measure_fidelity([RERUN, *rows])
    results = ladder.results(rows)
    common.write_csv(ladder.out / f"{name}.csv", results)
    plots.plot(results, ladder.out / f"{name}.svg")
    report.print_ladder([*results, *(r for r in ladder.results([RERUN]) if r["error_last"])])
    if not complete:
        return UNFINISHED
    return 1 if any(result["problems"] or crashed(result["error"]) for result in results) else 0


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args = parse_arguments(argv)
    if args.gains:
        gains.write(gains.recorded())
        return 0
    settings = settings_of(args)
    try:
        base, names, without = (parse_names(text, settings.device) for text in (args.base, args.opts, args.without))
    except OptimizationError as error:
        print(f"ladder.py: {error}", file=sys.stderr)
        return 2
    base, names = ([name for name in given if name not in without] for given in (base, names))
    ladder, rows = Ladder(args.out, settings, args.budget), rows_of(base, names, args.mode)[args.no_naive :]
    code = run(ladder, rows, args.measure.split(","), args.name)
    if args.update_gains:
        gains.write(gains.update(gains.read(), gains.of_ladder(args.out / "speed.csv")))
    return code


if __name__ == "__main__":
    sys.exit(main())

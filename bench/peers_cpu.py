"""This project beside other projects' engines on a CPU, the same weights in each: time, memory and error.

    python bench/peers_cpu.py --budget 3600                        # every engine at 512x512 and 256x256
    python bench/peers_cpu.py --engines openvino --sizes 256       # some
    python bench/peers_cpu.py --picture                            # and a whole picture of 20 steps
    python bench/peers_cpu.py --engines ours,short --opts cpu-bf16,cpu --opts cpu-int8,cpu   # in bf16 and int8

A CPU's speed drifts, so that only what ran side by side compares: one engine, the baseline, stays alive while the
others come one after another, each in a process of its own, and the two take turns round by round. Speed-ups are ratios
to the baseline in the same rounds. Rows that stand in the CSV file with these settings are not measured again: this
project's if they are from this commit, others' if they are from this version of theirs. Exit code 1: an engine failed.
75: --budget ended first; the same command goes on.
"""

import argparse
import contextlib
import logging
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common, peer_engines, peer_report
from bench.common import Spread
from bench.peer_engines import Opened, Run, Task
from bench.reference.numbers import relative_error
from sd import optimizations

FIRST = ("ours", "diffusers", "diffusers-compiled", "openvino")
REST = ("sdcpp-f16", "ours-pytorch", "diffusers-cl", "plain", "sdcpp-q8_0", "sdcpp-f32")
UNFINISHED = 75
SHORT = ("diffusers-bf16", "diffusers-bf16-cl", "diffusers-bf16-compiled", "openvino-bf16", "openvino-int8")
NO_PICTURES = ("openvino", "sdcpp")  # engines with other samplers than DDIM, or none
FEWEST = 2  # rounds that are worth a row when the budget ends before the last
MEASURED = (
    *("rounds", "median_s", "q1_s", "q3_s", "speedup", "speedup_q1", "speedup_q3", "baseline_s"),
    *("open_s", "first_s", "peak_gib", "peak_open_gib", "relative_error", "error"),
)
log = logging.getLogger("peers_cpu")


class OutOfTime(Exception):
    """The budget ended."""


class EngineError(Exception):
    """An engine failed; one line says how."""


class Deadline:
    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


class Worker:
    """An engine in a process of its own, told to run one part at a time."""

    def __init__(self, task: Task, deadline: Deadline):
        if deadline.left <= 0:
            raise OutOfTime
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.name, self.deadline = task.engine, deadline
        self.process = context.Process(target=peer_engines.serve, args=(theirs, task), daemon=True)
        self.process.start()
        theirs.close()
        try:
            self.opened: Opened = self._receive()
            self.first = {part: self.run("warm-up" if part == "picture" else part) for part in task.parts}
            first = ", ".join(f"first {part} {run.seconds:.1f} s" for part, run in self.first.items())
            log.info("%s: opened in %.0f s, %s", self.name, self.opened.seconds, first)
        except BaseException:
            self.process.kill()
            raise

    def run(self, part: str) -> Run:
        with contextlib.suppress(OSError):  # a process that ended is noticed when it does not answer
            self.pipe.send(part)
        return self._receive()

    def _receive(self):
        if not self.pipe.poll(max(0, min(self.deadline.left, 1e6))):
            raise OutOfTime
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            answer = f"its process ended with code {self.process.exitcode}"
        if isinstance(answer, str):
            raise EngineError(f"{self.name}: {answer}")
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send("")
        self.process.join(timeout=5)
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclass(frozen=True)
class Group:
    """Engines that are paired with one baseline, over some parts at one size."""

    size: int
    parts: tuple[str, ...]
    engines: tuple[str, ...]
    rounds: int


class Peers:
    """Measures groups into a CSV file."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.deadline = Deadline(args.budget)
        self.environment = common.environment(torch.device("cpu"), torch.float32)
        self.checkpoint = self._checkpoint()
        self.failed = False

    def _checkpoint(self) -> Path:
        """The weights as a file in the original layout, which all engines read; written once if they are random."""
        if self.args.weights not in ("random", "tiny"):
            return Path(self.args.weights)
        path = self.args.work / f"{self.args.weights}.safetensors"
        if not path.exists():
            log.info("writing %s", path)
            path.parent.mkdir(parents=True, exist_ok=True)
            arguments = (self.args.weights, path)
            process = multiprocessing.get_context("spawn").Process(target=peer_engines.write_checkpoint, args=arguments)
            process.start()
            process.join()
        return path

    def held(self, group: Group) -> dict[str, str | int]:
        """The settings of a group's rows."""
        steps = {"steps": self.args.steps if "picture" in group.parts else ""}
        return {"baseline": self.args.baseline, "size": group.size, **steps, "weights": self.checkpoint.name}

    def find(self, engine: str, part: str, group: Group) -> dict[str, str]:
        """The latest row of an engine under these settings on this device; or nothing.

        Rows of this project are those of this commit; those of others hold as long as their version does.
        """
        same = {key: self.environment[key] for key in ("device", "threads")}
        of_code = {"commit": self.environment["commit"]} if is_ours(engine) else {"peer_version": version_of(engine)}
        wanted = {"engine": engine, "part": part, **self.held(group), **same, **of_code}
        rows = reversed(common.read_csv(self.args.out))
        return next((row for row in rows if all(row[key] == str(value) for key, value in wanted.items())), {})

    def done(self, engine: str, group: Group) -> bool:
        rows = [self.find(engine, part, group) for part in group.parts]
        return all(row and not row["error"] for row in rows)

    def measure(self, group: Group) -> None:
        """Pair every engine that is not in the file yet with the baseline. Raises OutOfTime."""
        engines = [name for name in group.engines if name != self.args.baseline and not self.done(name, group)]
        engines = [name for name in engines if peer_engines.find(name).installed]
        if not engines:
            return
        references = self._references(group, engines)
        task = Task(self.args.baseline, self.checkpoint, group.size, group.parts, self.args.threads, self.args.steps)
        slowest = 0.0
        with Worker(task, self.deadline) as baseline:
            for name in engines:
                if slowest > self.deadline.left:
                    raise OutOfTime
                start = time.monotonic()
                self._pair(group, baseline, replace(task, engine=name), references)
                slowest = max(slowest, time.monotonic() - start)

    def _pair(self, group: Group, baseline: Worker, task: Task, references: dict[str, np.ndarray]) -> None:
        """Measure one engine beside the baseline and write its rows; its failure is a row too."""
        log.info("%dx%d: %s", group.size, group.size, task.engine)
        try:
            with Worker(task, self.deadline) as peer:
                theirs, mine = take_turns(baseline, peer, group, self.deadline)
                for part in group.parts:
                    reference = references.get(part, theirs[part][0].output)
                    if not self.find(self.args.baseline, part, group):
                        line = line_of(baseline, part, theirs[part], theirs[part], reference)
                        self._append(self.args.baseline, part, group, line)
                    if is_sdcpp(task.engine):
                        reference = references["glimpse"]
                    self._append(task.engine, part, group, line_of(peer, part, mine[part], theirs[part], reference))
        except EngineError as error:
            log.warning("%s", error)
            self.failed = True
            for part in group.parts:
                self._append(task.engine, part, group, {"error": str(error)})

    def _append(self, engine: str, part: str, group: Group, measured: dict) -> None:
        measured = {column: common.cell(measured.get(column, "")) for column in MEASURED}
        versions = {"peer_version": version_of(engine)}
        row = {"engine": engine, "part": part, **self.held(group), **measured, **versions, **self.environment}
        common.append_csv(self.args.out, row)

    def _references(self, group: Group, engines: Sequence[str]) -> dict[str, np.ndarray]:
        """What the plain pipeline computes in fp32, kept in files. A whole picture is compared with the baseline's."""
        parts = [part for part in group.parts if part != "picture"]
        parts += ["glimpse"] * any(is_sdcpp(name) for name in engines)
        stem = f"{self.checkpoint.stem}-{self.environment['commit']}-{group.size}"
        files = {part: self.args.work / f"{stem}-{part}.npy" for part in parts}
        if missing := tuple(part for part, file in files.items() if not file.exists()):
            self.args.work.mkdir(parents=True, exist_ok=True)
            task = Task("plain", self.checkpoint, group.size, missing, self.args.threads)
            with Worker(task, self.deadline) as plain:
                for part, run in plain.first.items():
                    np.save(files[part], run.output)
        return {part: np.load(file) for part, file in files.items()}


def is_ours(engine: str) -> bool:
    return not peer_engines.find(engine).package


def version_of(engine: str) -> str:
    package = peer_engines.find(engine).package
    return f"{package} {common.version(package)}" if package else ""


def is_sdcpp(engine: str) -> bool:
    """It only shows pictures, so that its error is that of a picture in bytes, after one step and the decoder."""
    return engine.startswith("sdcpp")


Runs = dict[str, list[Run]]


def take_turns(baseline: Worker, peer: Worker, group: Group, deadline: Deadline) -> tuple[Runs, Runs]:
    """The runs of both, round by round; the order turns round every time. Raises OutOfTime before FEWEST rounds.

    All rounds of a part together: a step follows a step, and finds in memory what it needs.
    """
    runs: tuple[Runs, Runs] = ({part: [] for part in group.parts}, {part: [] for part in group.parts})
    for part in group.parts:
        longest = 0.0
        for i in range(group.rounds):
            if i >= FEWEST and longest > deadline.left:
                log.warning("the budget ends after %d of %d rounds of %s", i, group.rounds, part)
                break
            start = time.monotonic()
            for j in (0, 1) if i % 2 == 0 else (1, 0):
                runs[j][part].append((baseline, peer)[j].run(part))
            longest = max(longest, time.monotonic() - start)
            log.info("%s, round %d of %d: %.0f s", part, i + 1, group.rounds, time.monotonic() - start)
    return runs


def line_of(worker: Worker, part: str, runs: Sequence[Run], beside: Sequence[Run], reference: np.ndarray) -> dict:
    """A row's measured columns. `speedup` is the baseline's time over this one's, of the same rounds."""
    seconds = Spread.of([run.seconds for run in runs])
    speedup = Spread.of([theirs.seconds / mine.seconds for theirs, mine in zip(beside, runs, strict=True)])
    return {
        "rounds": len(runs),
        "median_s": seconds.median,
        "q1_s": seconds.low,
        "q3_s": seconds.high,
        "speedup": speedup.median,
        "speedup_q1": speedup.low,
        "speedup_q3": speedup.high,
        "baseline_s": Spread.of([run.seconds for run in beside]).median,
        "open_s": worker.opened.seconds,
        "first_s": worker.first[part].seconds,
        "peak_gib": max(run.peak for run in runs) / 2**30,
        "peak_open_gib": max(worker.opened.peak, *(run.peak for run in worker.first.values())) / 2**30,
        "relative_error": relative_error(*(torch.from_numpy(x) for x in (runs[-1].output, reference))),
    }


def groups_of(args: argparse.Namespace) -> list[Group]:
    """What to measure, the most telling first."""
    several = {"ours": [f"ours:{opts}" for opts in args.opts], "short": SHORT}
    expand = lambda names: tuple(x for name in names for x in several.get(name, [name]))  # noqa: E731
    pairs = lambda names: [Group(size, ("step", "decode"), expand(names), args.rounds) for size in args.sizes]  # noqa: E731
    groups = pairs(args.engines or FIRST)
    if args.picture:
        able = [name for name in args.engines or FIRST[:2] if not name.startswith(NO_PICTURES)]
        groups.append(Group(max(args.sizes), ("picture",), expand(able), args.picture_rounds))
    if not args.engines:
        groups += pairs((*REST, *SHORT))
    return groups


def run(peers: Peers, groups: Sequence[Group]) -> int:
    """Measure, plot, print. Returns the exit code."""
    complete = True
    try:
        for group in groups:
            peers.measure(group)
    except OutOfTime:
        log.warning("the budget ended; the same command goes on")
        complete = False
    except EngineError as error:  # the baseline, or what it is compared with: an engine's own failure is a row
        log.error("%s", error)
        peers.failed = True
    peer_report.report(results(peers, groups), peers.args.out.with_suffix(".png"))
    return UNFINISHED if not complete else int(peers.failed)


def groups_in(rows: Sequence[dict[str, str]]) -> list[Group]:
    """The groups that a file's rows belong to."""
    engines: dict[tuple[int, str], dict[str, None]] = {}
    for row in rows:
        engines.setdefault((int(row["size"]), row["part"]), {})[row["engine"]] = None
    return [Group(size, (part,), tuple(names), 0) for (size, part), names in engines.items()]


def results(peers: Peers, groups: Sequence[Group]) -> list[dict[str, str]]:
    """The rows of these groups, and of what else stands in the file beside them (other sizes, engines, parts); an
    engine that is not installed has the line that helps."""
    rows = []
    for group in (*groups, *groups_in(common.read_csv(peers.args.out))):
        for name in dict.fromkeys((peers.args.baseline, *group.engines)):
            engine, found = peer_engines.find(name), [peers.find(name, part, group) for part in group.parts]
            rows += [row | {"label": engine.label} for row in found if row]
            if not any(found) and not engine.installed:
                rows.append(
                    {"label": engine.label, "size": str(group.size), "part": group.parts[0], "error": engine.hint}
                )
    return rows


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    description, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(("ours", "short: those in bf16 and int8", *peer_engines.ENGINES))
    parser.add_argument("--engines", type=words, metavar="A,B", help=f"of {names} (all)")
    parser.add_argument("--opts", action="append", metavar="A,B", help="of `ours`; may be repeated (cpu)")
    parser.add_argument("--baseline", default="diffusers", metavar="A", help="an engine, or ours:OPTS (%(default)s)")
    parser.add_argument("--sizes", type=lambda text: [int(size) for size in words(text)], default=[512, 256])
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each pair (%(default)s)")
    parser.add_argument("--picture", action="store_true", help="a whole picture by DDIM as well, at the largest size")
    parser.add_argument("--picture-rounds", type=int, default=1, metavar="N", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of a whole picture (%(default)s)")
    parser.add_argument("--weights", default="random", metavar="FILE", help="a checkpoint, or SD 1.5 at random")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="(%(default)s)")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="end by then")
    parser.add_argument("--work", type=Path, default=Path("out/peers"), metavar="DIR", help="for files (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/peers/peers_cpu.csv"), metavar="CSV", help="(%(default)s)"
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for an engine or an optimization that is unknown, and for a baseline that is not installed."""
    args.opts = args.opts or ["cpu"]
    for opts in args.opts:
        optimizations.check(opts)
    for name in (*(name for name in args.engines or () if name not in ("ours", "short")), args.baseline):
        engine = peer_engines.find(name)
    if not engine.installed:
        raise ValueError(f"the baseline {args.baseline} is not installed; pip install {engine.needs}")


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    try:
        check(args)
    except ValueError as error:
        print(f"peers_cpu.py: {error}", file=sys.stderr)
        return 2
    return run(Peers(args), groups_of(args))


if __name__ == "__main__":
    sys.exit(main())

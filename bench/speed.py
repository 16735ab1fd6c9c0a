"""A row's time and memory, in pairs with the plain pipeline in the same process."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from bench import common, fidelity
from bench.common import MemoryMeter, Spread
from bench.compilation import Counts, Watch
from bench.rungs import PLAIN, Row, Settings
from sd import optimizations
from sd.pipeline import StableDiffusion


@dataclass(frozen=True)
class Speed:
    """A row's columns on time and memory; seconds are those of a batch of pictures, quartiles stand beside medians."""

    pairs: int
    step_s: float
    step_s_q1: float
    step_s_q3: float
    picture_s: float
    picture_s_q1: float
    picture_s_q3: float
    step_speedup: float
    speedup: float
    speedup_q1: float
    speedup_q3: float
    compile_s: float
    pays_after: float
    mfu: float
    ceiling_tflops: float
    peak_gib: float
    graphs: int
    captures: int
    recaptures: int
    problems: str


@dataclass(frozen=True)
class Seconds:
    """One batch of pictures: the whole call, and one guided step of it."""

    picture: float
    step: float


class Bench:
    """The plain pipeline that every row is paired with, and what depends on the device alone."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.plain = common.load_pipeline(settings.weights, settings.device, settings.dtype)

    def draw_plain(self) -> Seconds:
        return draw_once(self.plain, self.settings, PLAIN)

    @cached_property
    def first_draw(self) -> Seconds:
        """Drawn once, before anything is timed: libraries load and choose their algorithms."""
        return self.draw_plain()

    @cached_property
    def ceiling(self) -> float:
        return common.matmul_ceiling(self.settings.device, self.settings.dtype)

    @cached_property
    def step_flops(self) -> int:
        """Of the plain model: a row that leaves work out is credited with it all the same."""
        s = self.settings
        return common.unet_flops(self.plain.config, s.size, s.size, 2 * s.batch)


def optimized(plain: StableDiffusion, row: Row) -> StableDiffusion:
    """The row's pipeline, over the plain one's weights. Raises what the optimizations raise."""
    pipe = common.clone_pipeline(plain)
    optimizations.apply(pipe, row.optimizations)
    return pipe


def draw_once(
    pipe: StableDiffusion, settings: Settings, row: Row, seed: int = 0, cfg_scale: float = 7.5, fewer_steps: int = 0
) -> Seconds:
    """Draw as many pictures as a batch holds, as a caller would."""
    sampling = row.sampling(settings.steps, settings.sampler)
    steps = sampling["steps"] = max(1, sampling["steps"] - fewer_steps)
    prompts = [fidelity.PROMPTS[(seed + i) % len(fidelity.PROMPTS)] for i in range(settings.batch)]
    options = {"height": settings.size, "width": settings.size, "cfg_scale": cfg_scale, **sampling}
    draw = lambda: pipe.generate(prompts, seed=seed, **options)  # noqa: E731
    picture = common.timed(draw, pipe.device)
    return Seconds(picture, pipe.times["denoise"] / steps)


def measure(bench: Bench, row: Row) -> Speed:
    """Apply a row's optimizations to a clone of the plain pipeline and time the two. Raises what applying raises."""
    settings = bench.settings
    _ = bench.first_draw
    meter, watch = MemoryMeter(settings.device), Watch()
    with watch.capturing():
        started = time.perf_counter()
        pipe = optimized(bench.plain, row)
        apply_seconds = time.perf_counter() - started
        shared = common.shared_bytes(pipe, bench.plain)
        first, peak = _warm_up(pipe, settings, row, meter, watch)
        warm = watch.counts()
        again = _vary(pipe, settings, row, watch) if compiles(warm) else warm
        calls = [bench.draw_plain, lambda: draw_once(pipe, settings, row)]
        plain, mine = common.interleave(calls, settings.pairs)
    usual = Spread.of([s.picture for s in mine]).median
    compile_seconds = max(0.0, apply_seconds + sum(first) - len(first) * usual) if row.names else 0.0
    return _summarize(bench, row, plain, mine, compile_seconds, (peak + shared) / 2**30, warm, again)


def _warm_up(
    pipe: StableDiffusion, settings: Settings, row: Row, meter: MemoryMeter, watch: Watch
) -> tuple[list[float], float]:
    """Draw until nothing is compiled any more. -> seconds of each picture, and the peak memory of the last."""
    seconds: list[float] = []
    draw = lambda: seconds.append(draw_once(pipe, settings, row).picture)  # noqa: E731
    peak = meter.peak(draw)
    if settings.device.type == "cuda" or compiles(watch.counts()):
        peak = meter.peak(draw)
    return seconds, peak


def compiles(counts: Counts) -> bool:
    return counts.graphs + counts.captures > 0


def _vary(pipe: StableDiffusion, settings: Settings, row: Row, watch: Watch) -> Counts:
    """The counts after another prompt, seed and guidance scale, and then another number of steps."""
    draw_once(pipe, settings, row, seed=1, cfg_scale=5.0)
    draw_once(pipe, settings, row, fewer_steps=1)
    return watch.counts()


def find_problems(row: Row, warm: Counts, again: Counts, on_cuda: bool) -> str:
    """Graph breaks, CUDA graphs skipped, and what was compiled or captured anew for another prompt, seed, scale or
    number of steps. A graph of the whole loop holds for one scale and number of steps: its captures do not count."""
    found = {
        "graph breaks": warm.graph_breaks,
        "recompilations": again.graphs - warm.graphs,
        "CUDA graphs skipped": again.skipped,
        "CUDA graphs captured again": 0 if "loop-graph" in row.names else again.captures - warm.captures,
    }
    problems = [f"{count} {what}" for what, count in found.items() if count]
    if on_cuda and any("graph" in name for name in row.names) and not warm.captures:
        problems.append("no CUDA graph captured")
    return "; ".join(problems)


def _summarize(
    bench: Bench,
    row: Row,
    plain: Sequence[Seconds],
    mine: Sequence[Seconds],
    compile_seconds: float,
    peak_gib: float,
    warm: Counts,
    again: Counts,
) -> Speed:
    """Medians and quartiles; speed-ups pair by pair, so that what slowed both of a pair cancels."""
    step, picture = Spread.of([s.step for s in mine]), Spread.of([s.picture for s in mine])
    ratio = Spread.of([p.picture / m.picture for p, m in zip(plain, mine, strict=True)])
    saved = Spread.of([p.picture for p in plain]).median - picture.median
    return Speed(
        pairs=len(mine),
        step_s=step.median,
        step_s_q1=step.low,
        step_s_q3=step.high,
        picture_s=picture.median,
        picture_s_q1=picture.low,
        picture_s_q3=picture.high,
        step_speedup=Spread.of([p.step / m.step for p, m in zip(plain, mine, strict=True)]).median,
        speedup=ratio.median,
        speedup_q1=ratio.low,
        speedup_q3=ratio.high,
        compile_s=compile_seconds,
        pays_after=pays_after(compile_seconds, saved),
        mfu=bench.step_flops / step.median / bench.ceiling,
        ceiling_tflops=bench.ceiling / 1e12,
        peak_gib=peak_gib,
        graphs=warm.graphs,
        captures=warm.captures,
        recaptures=again.captures - warm.captures,
        problems=find_problems(row, warm, again, bench.settings.device.type == "cuda"),
    )


def pays_after(compile_seconds: float, saved: float) -> float:
    """Batches of pictures, each saving so many seconds, after which compiling has paid; infinite if it never does."""
    if compile_seconds == 0:
        return 0.0
    return float(math.ceil(compile_seconds / saved)) if saved > 0 else math.inf

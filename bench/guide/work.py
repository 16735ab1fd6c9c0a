"""What an optimization leaves to be computed, counted on the meta device: nothing runs, and the shapes are SD 1.5's."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.roofline import Call, Ceilings, work_of
from sd.config import SD15
from sd.guidance import Conditions, Guided
from sd.models import build
from sd.optimizations.base import Record
from sd.optimizations.explain import Row, explain
from sd.optimizations.registry import read
from sd.pipeline import DEMO_CHECKPOINT, StableDiffusion

STEPS, SIDE = 50, 64


def plain() -> StableDiffusion:
    """SD 1.5 without weights."""
    return StableDiffusion(SD15, *build(SD15))


@functools.cache
def demo(dtype: str) -> StableDiffusion:
    """The demo model, plain, to be explained."""
    return StableDiffusion.load(DEMO_CHECKPOINT, "cpu", getattr(torch, dtype))


@contextmanager
def switched(pipe: StableDiffusion, text: str) -> Iterator[Record]:
    """A pipeline with one optimization on, whether or not this machine could run it."""
    choice = read(text)
    record = Record(pipe)
    patch = record.patch(choice.name)
    choice.optimization.function(patch, *choice.arguments)
    patch.finish()
    pipe.record = record
    try:
        yield record
    finally:
        record.undo()
        del pipe.record


def explained(pipe: StableDiffusion, text: str) -> tuple[list[Row], list[Row]]:
    """The rows that an optimization changes, before and after. Raises what it raises without weights."""
    if read(text).optimization.dtype:  # without a file, converted weights do not come back
        pipe = plain()
    before = explain(pipe).rows
    with switched(pipe, text):
        after = explain(pipe).rows
    return [row for row in before if row not in after], [row for row in after if row not in before]


@dataclass(frozen=True)
class Work:
    """GFLOP of the UNet in a picture, and in the cheapest of its steps."""

    picture: float
    cheapest: float
    steps: int


@torch.no_grad()
def counted(pipe: StableDiffusion, record: Record, steps: int = STEPS) -> Work:
    """Calls that captured graphs would not tell apart do the same work: each is counted once, as is the first step."""
    x = torch.zeros(1, 4, SIDE, SIDE, device="meta")
    context = torch.zeros(2, 77, 768, device="meta")
    denoise = Guided(pipe.unet, Conditions(context, 7.5), pipe.call)
    known: dict[tuple, int] = {}
    each = []
    with pipe.call.sampling(range(steps), guided=True) as start:
        for step in range(steps):
            start(step)
            key = (step == 0, _key(pipe, record))
            if key not in known:
                with FlopCounterMode(display=False) as counter:
                    denoise(x, 500)
                known[key] = counter.get_total_flops()
            each.append(known[key] / 1e9)
    return Work(sum(each), min(each), steps)


@functools.cache
def counted_plain() -> Work:
    pipe = plain()
    return counted(pipe, Record(pipe))


def _key(pipe: StableDiffusion, record: Record) -> tuple:
    """With what is kept for a call brought up to the step; in `predict` it would be done by the call itself."""
    with pipe.call.halves(alike=True):
        for patch in record.patches:
            for refresh in patch.refreshers:
                if getattr(refresh, "__name__", "") == "start":
                    refresh(None)
        return record.key()


# ---- the kinds of calls of a guided step


@functools.cache
def step_calls() -> tuple[Call, ...]:
    return tuple(work_of(SD15, "unet", 8 * SIDE))


def chosen(selectors: list[str]) -> list[Call]:
    """The calls of a guided step of these kinds: `conv3x3`, or `conv3x3@8x8` on that grid."""
    found = []
    for selector in selectors:
        kind, _, grid = selector.partition("@")
        some = [call for call in step_calls() if call.kind == kind and grid in ("", call.grid)]
        if not some:
            raise ValueError(f"no call {selector!r}; there are {', '.join(sorted({c.kind for c in step_calls()}))}")
        found += some
    return found


def floor_seconds(calls, ceilings: Ceilings, bytes_share: float = 1.0) -> float:
    """bytes_share: half for fp16, since the calls are counted in fp32."""
    return sum(max(c.flops / ceilings.flops, c.bytes * bytes_share / ceilings.bytes) for c in calls)

"""Charts of measurements as SVG: bars, and a staircase of seconds that says what each step saved."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.svg import BLUE, GREEN, GREY, INK, LINE, RED, SOFT, Drawing, width_of

ROW, STEP, TOP = 24, 30, 40
WIDTH = 860
Place = Callable[[float], float]


def axis(least: float, most: float, left: float, right: float, log: bool = False) -> Place:
    """From values to pixels."""
    scale = math.log if log else float
    low, high = (scale(least), scale(most)) if least or not log else (0.0, scale(most))
    return lambda value: left + (right - left) * (scale(value) - low) / (high - low)


def round_numbers(least: float, most: float, log: bool = False) -> Iterator[float]:
    """Those that an axis names."""
    if log:
        powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
        numbers = (digit * 10.0**power for power in powers for digit in (1, 2, 5))
        yield from (number for number in numbers if least <= number <= most)
        return
    step = 10.0 ** math.floor(math.log10((most - least) / 2))
    step *= next(factor for factor in (0.5, 1, 2, 2.5, 5, 10) if (most - least) / (factor * step) <= 7)
    first, last = math.ceil(least / step - 1e-9), math.floor(most / step + 1e-9)
    yield from (i * step for i in range(first, last + 1))


def titled(title: str, width: float, height: float) -> Drawing:
    drawing = Drawing(width, height, title)
    drawing.text(16, 24, title, 14, font_weight="bold")
    return drawing


def legend(drawing: Drawing, x: float, y: float, entries: Sequence[tuple[str, str]]) -> None:
    """entries: what a colour is, the colour."""
    for text, color in entries:
        drawing.box(x, y - 10, 11, 11, fill=color)
        drawing.text(x + 16, y, text, 12, SOFT)
        x += 36 + width_of(text, 12)


# ---- bars


@dataclass(frozen=True)
class Bar:
    """parts: (value, colour) from left to right. note: what stands behind it."""

    label: str
    parts: tuple[tuple[float, str], ...]
    note: str = ""


def bars(title: str, rows: Sequence[Bar], colors: Sequence[tuple[str, str]] = (), width: float = WIDTH) -> Drawing:
    """A row a bar. colors: a legend."""
    left = 24 + max(width_of(row.label, 12) for row in rows)
    right = 24 + max(width_of(row.note, 12) for row in rows)
    scale = (width - left - right) / max(sum(value for value, _ in row.parts) for row in rows)
    top = TOP + (20 if colors else 0)
    drawing = titled(title, width, top + ROW * len(rows) + 12)
    legend(drawing, 16, 44, colors)
    for i, row in enumerate(rows):
        _bar(drawing, row, left, top + ROW * i, scale)
    return drawing


def _bar(drawing: Drawing, row: Bar, left: float, y: float, scale: float) -> None:
    drawing.text(left - 8, y + 16, row.label, 12, text_anchor="end")
    x = left
    for value, color in row.parts:
        drawing.box(x, y + 4, max(value * scale, 0.5), ROW - 8, fill=color)
        x += value * scale
    drawing.text(x + 6, y + 16, row.note, 12, SOFT)


# ---- the staircase


@dataclass(frozen=True)
class Rung:
    """A row of a ladder. low, high: quartiles, or NaN. follows: it stands on the row before it."""

    label: str
    seconds: float
    low: float = math.nan
    high: float = math.nan
    follows: bool = True


def staircase(title: str, rungs: Sequence[Rung], log: bool = False, width: float = WIDTH) -> Drawing:
    """Seconds from above to below. log: the axis is logarithmic."""
    left, bottom = 24 + max(width_of(rung.label, 12) for rung in rungs), TOP + STEP * len(rungs)
    most = max(rung.high if rung.high > rung.seconds else rung.seconds for rung in rungs)
    least = min(rung.seconds for rung in rungs) / 1.3 if log else 0.0
    place = axis(least, most, left, width - 150, log)
    drawing = titled(title, width, bottom + 30)
    for value in round_numbers(least, most, log):
        drawing.line((place(value), TOP - 4), (place(value), bottom), color=LINE, width=1)
        drawing.text(place(value), bottom + 16, f"{value:g} s", 11, SOFT, text_anchor="middle")
    for i, rung in enumerate(rungs):
        before = rungs[i - 1] if i and rung.follows else None
        _rung(drawing, rung, before, TOP + STEP * i, place)
    return drawing


def _rung(drawing: Drawing, rung: Rung, before: Rung | None, y: float, place: Place) -> None:
    x = place(rung.seconds)
    drawing.text(16, y + 19, rung.label, 12)
    start = place(before.seconds) if before else x
    if before:
        drawing.line((start, y - STEP + 25), (start, y + 15), color=GREY, width=1)
        color = GREEN if x < start else RED
        drawing.box(min(x, start), y + 7, max(abs(start - x), 1), 16, fill=color, fill_opacity="0.3")
    if rung.low == rung.low:
        drawing.line((place(rung.low), y + 15), (place(rung.high), y + 15), color=INK, width=1)
    drawing.line((x, y + 5), (x, y + 25), color=BLUE, width=3)
    edge = max(x, start, place(rung.high) if rung.high == rung.high else x)
    drawing.text(edge + 8, y + 19, told(rung, before), 12, SOFT)


def told(rung: Rung, before: Rung | None) -> str:
    """`0.348 s, saves 31%`"""
    seconds = f"{rung.seconds:#.3g}".removesuffix(".") + " s"
    if before is None:
        return seconds
    saved = (before.seconds - rung.seconds) / before.seconds
    return f"{seconds}, {'saves' if saved >= 0 else 'costs'} {abs(saved):.1%}"

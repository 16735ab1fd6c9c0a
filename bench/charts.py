"""Charts of measurements, as SVG: bars, a staircase of what each step saved, and speed against how near a picture is."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.svg import BLUE, GREEN, GREY, INK, LINE, ORANGE, RED, SOFT, Drawing, width_of

ROW, TOP = 24, 40


@dataclass(frozen=True)
class Bar:
    """parts: (value, colour) from left to right. note: what stands behind it."""

    label: str
    parts: tuple[tuple[float, str], ...]
    note: str = ""


def bars(title: str, rows: Sequence[Bar], legend: Sequence[tuple[str, str]] = (), width: float = 860) -> Drawing:
    """A row a bar. legend: (what a colour is, the colour)."""
    left = 24 + max(width_of(row.label, 12) for row in rows)
    right = 24 + max(width_of(row.note, 12) for row in rows)
    scale = (width - left - right) / max(sum(value for value, _ in row.parts) for row in rows)
    top = TOP + (20 if legend else 0)
    drawing = Drawing(width, top + ROW * len(rows) + 12, title)
    drawing.text(16, 24, title, 14, font_weight="bold")
    if legend:
        _legend(drawing, 16, 44, legend)
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


def _legend(drawing: Drawing, x: float, y: float, entries: Sequence[tuple[str, str]]) -> None:
    for text, color in entries:
        drawing.box(x, y - 10, 11, 11, fill=color)
        drawing.text(x + 16, y, text, 12, SOFT)
        x += 36 + width_of(text, 12)


# ---- the staircase


@dataclass(frozen=True)
class Rung:
    """One row of a ladder. low, high: quartiles, if there are any. follows: it stands on the row before it, which it
    has to be compared with; else it begins anew."""

    label: str
    seconds: float
    low: float = math.nan
    high: float = math.nan
    follows: bool = True


def staircase(title: str, rungs: Sequence[Rung], width: float = 860, unit: str = "s", log: bool = False) -> Drawing:
    """Seconds from above to below; each step says what it saved. log: the axis is logarithmic."""
    left = 24 + max(width_of(rung.label, 12) for rung in rungs)
    right = 190
    drawing = Drawing(width, TOP + 30 * len(rungs) + 34, title)
    drawing.text(16, 24, title, 14, font_weight="bold")
    most = max(max(rung.seconds, rung.high if rung.high == rung.high else 0) for rung in rungs)
    least = min(rung.seconds for rung in rungs) / 1.6 if log else 0.0
    place = _axis(least, most, left, width - right, log)
    _ticks(drawing, place, least, most, TOP + 30 * len(rungs), unit, log)
    before = None
    for i, rung in enumerate(rungs):
        _rung(drawing, rung, before, TOP + 30 * i, place, unit)
        before = rung
    return drawing


def _axis(least: float, most: float, left: float, right: float, log: bool):
    def place(value: float) -> float:
        if log:
            return left + (right - left) * math.log(value / least) / math.log(most / least)
        return left + (right - left) * (value - least) / (most - least)

    return place


def _ticks(drawing: Drawing, place, least: float, most: float, bottom: float, unit: str, log: bool) -> None:
    for value in _round_numbers(least, most, log):
        x = place(value)
        drawing.line((x, TOP - 4), (x, bottom), color=LINE, width=1)
        drawing.text(x, bottom + 16, f"{value:g} {unit}", 11, SOFT, text_anchor="middle")


def _round_numbers(least: float, most: float, log: bool) -> Iterator[float]:
    if log:
        powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
        yield from (v for p in powers for v in (10.0**p, 2 * 10.0**p, 5 * 10.0**p) if least <= v <= most)
        return
    step = 10.0 ** math.floor(math.log10(most / 2))
    step *= next(f for f in (1, 2, 2.5, 5, 10) if most / (f * step) <= 6)
    yield from (i * step for i in range(math.floor(most / step) + 1))


def _rung(drawing: Drawing, rung: Rung, before: Rung | None, y: float, place, unit: str) -> None:
    x = place(rung.seconds)
    drawing.text(place.left if hasattr(place, "left") else 0, y, "") if False else None
    start = place(before.seconds) if before and rung.follows else None
    drawing.text(16, y + 19, rung.label, 12)
    if start is not None:
        color = GREEN if x < start else RED
        drawing.line((start, y), (start, y + 15), color=GREY, width=1)
        drawing.box(min(x, start), y + 7, max(abs(start - x), 1), 16, fill=color, fill_opacity="0.25")
    if rung.low == rung.low:
        drawing.line((place(rung.low), y + 15), (place(rung.high), y + 15), color=INK, width=1)
    drawing.line((x, y + 5), (x, y + 25), color=BLUE, width=3)
    drawing.text(max(x, start or 0) + 8, y + 19, _told(rung, before, unit), 12, SOFT)


def _told(rung: Rung, before: Rung | None, unit: str) -> str:
    told = f"{rung.seconds:#.3g} {unit}".replace(". ", " ")
    if before is None or not rung.follows:
        return told
    saved = before.seconds - rung.seconds
    if abs(saved) < 5e-4 * before.seconds:
        return f"{told}, no change"
    return f"{told}, {'saves' if saved > 0 else 'costs'} {abs(saved) / before.seconds:.1%}"


# ---- speed against nearness


@dataclass(frozen=True)
class Point:
    """An approximate row: times as fast, dB from the reference; thumbnail: a WebP, if there is one."""

    label: str
    speedup: float
    decibels: float
    low: float = math.nan
    high: float = math.nan
    thumbnail: bytes = b""
    exact: bool = False


def nearness(title: str, points: Sequence[Point], below: str, width: float = 860, height: float = 460) -> Drawing:
    """Speed to the right, dB upwards. below: what the speed is relative to."""
    drawing = Drawing(width, height, title)
    drawing.text(16, 24, title, 14, font_weight="bold")
    left, right, top, bottom = 56, width - 190, 48, height - 48
    fastest = max(max(p.speedup for p in points) * 1.08, 1.2)
    slowest = min(min(p.speedup for p in points), 1.0) * 0.9
    most, least = 5 * math.ceil((max(p.decibels for p in points) + 4) / 5), 10
    x_of = _axis(slowest, fastest, left, right, False)
    y_of = lambda db: bottom - (bottom - top) * (db - least) / (most - least)  # noqa: E731
    for db in range(least, most + 1, 10):
        drawing.line((left, y_of(db)), (right, y_of(db)), color=LINE, width=1)
        drawing.text(left - 6, y_of(db) + 4, f"{db} dB", 11, SOFT, text_anchor="end")
    step = 0.5 if fastest > 1.8 else 0.2 if fastest > 1.4 else 0.1
    for i in range(math.ceil(slowest / step), math.floor(fastest / step) + 1):
        drawing.line((x_of(i * step), top), (x_of(i * step), bottom), color=LINE, width=1)
        drawing.text(x_of(i * step), bottom + 16, f"{i * step:.1f}x", 11, SOFT, text_anchor="middle")
    drawing.text((left + right) / 2, height - 12, below, 12, SOFT, text_anchor="middle")
    for point in points:
        _point(drawing, point, x_of, y_of)
    return drawing


def _point(drawing: Drawing, point: Point, x_of, y_of) -> None:
    x, y = x_of(point.speedup), y_of(point.decibels)
    if point.low == point.low:
        drawing.line((x_of(point.low), y), (x_of(point.high), y), color=GREY, width=1)
    side = 56 if point.thumbnail else 0
    if side:
        drawing.picture(x + 8, y - side / 2, side, side, point.thumbnail)
    drawing.shape("circle", cx=x, cy=y, r=5, fill=BLUE if point.exact else ORANGE)
    drawing.text(x + 14 + side, y - 2, point.label, 12)
    drawing.text(x + 14 + side, y + 13, f"{point.speedup:.2f}x, {point.decibels:.0f} dB", 11, SOFT)

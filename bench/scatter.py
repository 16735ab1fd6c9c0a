"""Charts of points as SVG: speed against how near a picture is, and a roofline."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.charts import WIDTH, Place, axis, legend, round_numbers, titled
from bench.svg import BLUE, GREY, LINE, ORANGE, SOFT, Drawing

LEFT, TOP = 60, 52


@dataclass(frozen=True)
class Point:
    """An approximate row: times as fast, its quartiles, dB from the reference. thumbnail: a WebP of what it draws."""

    label: str
    speedup: float
    low: float
    high: float
    decibels: float
    thumbnail: bytes = b""


def nearness(title: str, points: Sequence[Point], below: str, height: float = 440) -> Drawing:
    """Speed to the right, decibels upwards. below: what the speed is relative to."""
    drawing = titled(title, WIDTH, height)
    right, bottom = WIDTH - 250, height - 48
    speeds = [point.speedup for point in points]
    slowest, fastest = min(*speeds, 1.0) - 0.05, max(*speeds, 1.05) + 0.05
    least = 5 * math.floor((min(p.decibels for p in points) - 3) / 5)
    most = 5 * math.ceil((max(p.decibels for p in points) + 3) / 5)
    x_of, y_of = axis(slowest, fastest, LEFT, right), axis(least, most, bottom, TOP)
    for db in range(least, most + 1, 5):
        drawing.line((LEFT, y_of(db)), (right, y_of(db)), color=LINE, width=1)
        drawing.text(LEFT - 6, y_of(db) + 4, f"{db} dB", 11, SOFT, text_anchor="end")
    for speed in round_numbers(slowest, fastest):
        drawing.line((x_of(speed), TOP), (x_of(speed), bottom), color=LINE, width=1)
        drawing.text(x_of(speed), bottom + 16, f"{speed:.3g}x", 11, SOFT, text_anchor="middle")
    drawing.text((LEFT + right) / 2, height - 12, below, 12, SOFT, text_anchor="middle")
    for point, y in _apart(points, y_of):
        _point(drawing, point, x_of, y_of(point.decibels), y)
    return drawing


def _apart(points: Sequence[Point], y_of: Place) -> list[tuple[Point, float]]:
    """The points from above to below, and where their labels fit below one another."""
    placed: list[tuple[Point, float]] = []
    for point in sorted(points, key=lambda point: -point.decibels):
        y = y_of(point.decibels)
        height = 60 if point.thumbnail else 30
        near = [other for p, other in placed if abs(p.speedup - point.speedup) < 0.6 and y - other < height]
        placed.append((point, max((other + height for other in near), default=y)))
    return placed


def _point(drawing: Drawing, point: Point, x_of: Place, y: float, label_y: float) -> None:
    x = x_of(point.speedup)
    drawing.line((x_of(point.low), y), (x_of(point.high), y), color=GREY, width=1)
    drawing.shape("circle", cx=x, cy=y, r=5, fill=ORANGE)
    if label_y != y:
        drawing.line((x, y), (x + 8, label_y), color=GREY, width=1)
    side = 56 if point.thumbnail else 0
    if side:
        drawing.picture(x + 10, label_y - side / 2, side, side, point.thumbnail)
    drawing.text(x + 14 + side, label_y - 2, point.label.removeprefix("+ "), 12)
    drawing.text(x + 14 + side, label_y + 13, f"{point.speedup:.2f}x, {point.decibels:.1f} dB", 11, SOFT)


# ---- a roofline


@dataclass(frozen=True)
class Kernel:
    """intensity: FLOPs a byte. rate: FLOP/s reached, or NaN where it was not measured."""

    label: str
    intensity: float
    rate: float = math.nan


def roofline(title: str, kernels: Sequence[Kernel], flops: float, size: float, height: float = 400) -> Drawing:
    """The two roofs, at `flops` FLOP/s and `size` bytes/s, and where the kernels stand under them."""
    drawing = titled(title, WIDTH, height)
    right, bottom = WIDTH - 24, height - 48
    least, most = min(k.intensity for k in kernels) / 2, max(k.intensity for k in kernels) * 2
    x_of = axis(least, most, LEFT, right, log=True)
    lowest = min([least * size, *(k.rate for k in kernels if k.rate == k.rate)]) / 1.5
    y_of = axis(lowest, flops * 2, bottom, TOP, log=True)
    for value in round_numbers(least, most, log=True):
        drawing.line((x_of(value), TOP), (x_of(value), bottom), color=LINE, width=1)
        drawing.text(x_of(value), bottom + 16, f"{value:g}", 11, SOFT, text_anchor="middle")
    for value in round_numbers(lowest, flops * 2, log=True):
        if f"{value:e}"[0] == "1":
            drawing.text(LEFT - 6, y_of(value) + 4, rate(value), 11, SOFT, text_anchor="end")
            drawing.line((LEFT, y_of(value)), (right, y_of(value)), color=LINE, width=1)
    ridge = flops / size
    drawing.line(
        (x_of(least), y_of(least * size)), (x_of(ridge), y_of(flops)), (right, y_of(flops)), color=BLUE, width=2
    )
    drawing.text(right, y_of(flops) - 14, f"a large product: {rate(flops)}FLOP/s", 12, BLUE, text_anchor="end")
    drawing.text(x_of(ridge) + 6, bottom - 8, f"the ridge: {ridge:.0f} FLOP a byte", 12, SOFT)
    drawing.line((x_of(ridge), y_of(flops)), (x_of(ridge), bottom), color=GREY, width=1, stroke_dasharray="4 3")
    legend(
        drawing,
        16,
        44,
        [("the floor's rate", BLUE), ("measured", ORANGE)] if kernels[0].rate == kernels[0].rate else [],
    )
    drawing.text(
        (LEFT + right) / 2, height - 12, "FLOP for each byte that is read or written", 12, SOFT, text_anchor="middle"
    )
    for i, kernel in enumerate(sorted(kernels, key=lambda k: k.intensity), 1):
        drawing.text(right - 170, bottom - 16 * (len(kernels) - i) - 30, f"{i}  {kernel.label}", 12)
        _kernel(drawing, kernel, i, x_of, y_of, min(flops, kernel.intensity * size))
    return drawing


def _kernel(drawing: Drawing, kernel: Kernel, i: int, x_of: Place, y_of: Place, roof: float) -> None:
    x, y = x_of(kernel.intensity), y_of(kernel.rate if kernel.rate == kernel.rate else roof)
    drawing.shape("circle", cx=x, cy=y_of(roof), r=3, fill=BLUE)
    if kernel.rate == kernel.rate:
        drawing.line((x, y_of(roof)), (x, y), color=GREY, width=1)
    drawing.shape("circle", cx=x, cy=y, r=9, fill=ORANGE if kernel.rate == kernel.rate else BLUE)
    drawing.text(x, y + 4, str(i), 11, "#ffffff", text_anchor="middle")


def rate(value: float) -> str:
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g} "

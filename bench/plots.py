"""A ladder as plots: exact rows as a staircase of seconds, approximate ones as speed against decibels."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from bench.charts import Rung, staircase
from bench.common import read_csv
from bench.scatter import Point, nearness
from bench.svg import Drawing
from sd.writing import write_whole

Result = Mapping[str, str]
LABELS = MappingProxyType({"naive": "attention spelled out", "sdpa": "plain"})
BASES = {"h100/ladder.csv": "+ cuda-graph, async-noise"}
"""What the rows of a ladder have in common, where it is short enough to be said."""


def plot(results: Sequence[Result], path: Path) -> None:
    """Into NAME.svg, and NAME-approximate.svg if there are rows of that kind."""
    for suffix, drawing in drawings(results).items():
        write_whole(path.with_name(f"{path.stem}{suffix}{path.suffix}"), str(drawing).encode())


def drawings(results: Sequence[Result], labels: Mapping[str, str] = LABELS) -> dict[str, Drawing]:
    """By what the file's name ends in: "" for exact rows, "-approximate" for the others; each only if there are two."""
    size = f"{results[0]['size']}x{results[0]['size']}, {results[0]['steps']} steps"
    title = f"{results[0]['device']}, {results[0]['dtype']}, {size}"
    steps, points = rungs(results, labels), approximate(results)
    found = {}
    if len(steps) > 2:
        found[""] = staircase(f"Seconds of a picture: {title}", steps)
    if points:
        below = "the exact ones that all of them stand on" if any(r["row"] == "base" for r in results) else "plain"
        found["-approximate"] = nearness(f"Approximate: {title}", points, f"times as fast as {below}")
    return found


def rungs(results: Sequence[Result], labels: Mapping[str, str] = LABELS) -> list[Rung]:
    """The exact rows that were timed. One that holds all that the row before it had stands on that; so does the plain
    one on `naive`."""
    rows = [r for r in results if r["exact"] == "1" and r["picture_s"]]
    before: Result = {"opts": "none"}
    steps = []
    for row in rows:
        held, has = ({*r["opts"].split(",")} - {"none", "naive"} for r in (before, row))
        seconds = [float(row[column]) for column in ("picture_s", "picture_s_q1", "picture_s_q3")]
        steps.append(Rung(labels.get(row["row"], row["row"]), *seconds, follows=held <= has))
        before = row
    return steps


def approximate(results: Sequence[Result]) -> list[Point]:
    """The rows whose speed and fidelity were measured. Where they stand on a base, they are as fast as that is slow:
    how long a plain picture takes depends on the host there, and one pair says little."""
    rows = [r for r in results if r["exact"] == "0" and r["picture_s"] and _decibels(r) < math.inf]
    base = next((r for r in results if r["row"] == "base"), None)
    return [Point(r["row"], *_speed(r, base), _decibels(r)) for r in rows]


def _decibels(row: Result) -> float:
    return float(row["psnr_db"] or "inf")


def _speed(row: Result, base: Result | None) -> tuple[float, float, float]:
    """The median and the quartiles."""
    if base is None:
        median, low, high = (float(row[column]) for column in ("speedup", "speedup_q1", "speedup_q3"))
    else:
        median, low, high = (float(base["picture_s"]) / float(row[f"picture_s{q}"]) for q in ("", "_q3", "_q1"))
    return median, low, high


def of_documents(results: Path) -> dict[str, Drawing]:
    """The plots of the ladders that are kept, by their names below bench/results."""
    found: dict[str, Drawing] = {}
    for path in sorted(results.rglob("*.csv")):
        rows = read_csv(path)
        if not rows or not {"row", "picture_s", "psnr_db"} <= rows[0].keys():
            continue
        name = path.relative_to(results).as_posix()
        found |= {
            f"{name.removesuffix('.csv')}{suffix}.svg": drawing
            for suffix, drawing in drawings(rows, LABELS | ({"base": BASES[name]} if name in BASES else {})).items()
        }
    return found

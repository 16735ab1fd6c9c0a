"""The front pages: front/NAME.md, in which `{{name}}` stands for a table or a drawing that is made here."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.charts import Bar, Rung, bars, staircase
from bench.common import read_csv
from bench.gains import RESULTS
from bench.guide import anatomy, facts, pictures, tables, work
from bench.plots import LABELS, approximate, rungs
from bench.roofline import Ceilings
from bench.scatter import Kernel, Point, nearness, roofline
from bench.svg import BLUE, GREEN, GREY, ORANGE, RED, Drawing

FOLDER = Path(__file__).with_name("front")
GRIDS = {"64x64": BLUE, "32x32": GREEN, "16x16": ORANGE, "8x8": RED}
STEP = "a guided step at 512x512"


def pages(drawn_in: Path) -> dict[str, str]:
    """The pages and their drawings. drawn_in: the folder of the pictures."""
    makers = makers_of(drawn_in)
    found: dict[str, str] = {}

    def made(match: re.Match) -> str:
        thing = makers[match[1]]()
        if isinstance(thing, str):
            return thing
        found[f"drawings/{match[1]}.svg"] = str(thing)
        return f"![{thing.title}](drawings/{match[1]}.svg)"

    for path in sorted(FOLDER.glob("*.md")):
        found[path.name] = re.sub(r"\{\{([\w-]+)\}\}", made, path.read_text())
    return found


def makers_of(drawn_in: Path) -> Mapping[str, Callable[[], str | Drawing]]:
    drawn = pictures.read(drawn_in)
    return {
        "text": anatomy.text,
        "unet": anatomy.unet,
        "bits": anatomy.bits,
        "flops": flops,
        "cpu-time": cpu_time,
        "gpu-time": gpu_time,
        "roofline-cpu": roofline_cpu,
        "roofline-gpu": roofline_gpu,
        "ladder": lambda: staircase("One H100, fp16, 512x512, 50 steps: seconds of a picture", h100_rungs()),
        "history": history,
        "approximate": lambda: nearest(drawn_in),
        "optimizations": lambda: tables.optimizations(drawn),
        "presets": tables.presets,
        "spread": tables.spread,
        "precision": lambda: tables.precision(drawn),
        "exact-picture": lambda: tables.sheet("exact", drawn),
        "fast-picture": lambda: tables.sheet("fast", drawn),
    }


# ---- where the time goes


def flops() -> Drawing:
    """By kind, with the grids in colours."""
    kinds: dict[str, dict[str, float]] = {}
    for call in work.step_calls():
        if call.flops:
            by_grid = kinds.setdefault(call.kind, dict.fromkeys(GRIDS, 0.0))
            by_grid[call.grid] += call.flops / 1e9
    total = sum(sum(by_grid.values()) for by_grid in kinds.values())
    rows = [
        Bar(kind, tuple((value, GRIDS[grid]) for grid, value in by_grid.items()), _share(sum(by_grid.values()), total))
        for kind, by_grid in sorted(kinds.items(), key=lambda item: -sum(item[1].values()))
    ]
    return bars(f"GFLOP of {STEP}: {total:.0f}", rows, list(GRIDS.items()))


def _share(value: float, total: float) -> str:
    return f"{value:.3g}, {value / total:.1%}"


def cpu_time() -> Drawing:
    """By kind: the floor, and what was measured beyond it."""
    kinds: dict[str, list[float]] = {}
    for line in facts.roofline():
        times = kinds.setdefault(line["kind"], [0.0, 0.0])
        times[0] += float(line["floor_ms"]) / 1e3
        times[1] += float(line["measured_ms"]) / 1e3
    total = sum(measured for _, measured in kinds.values())
    rows = [
        Bar(kind, ((floor, BLUE), (max(measured - floor, 0), GREY)), f"{measured:.2f} s, {measured / total:.1%}")
        for kind, (floor, measured) in sorted(kinds.items(), key=lambda item: -item[1][1])
    ]
    colors = [("the floor", BLUE), ("beyond it", GREY)]
    return bars(f"Seconds of {STEP}, plain, on two cores with AVX2: {total:.1f}", rows, colors)


def gpu_time() -> Drawing:
    """The kernels of a step, by what they do, with the exact ones on but split-conv and the newest GEGLU."""
    probe = json.loads((RESULTS / "h100" / "probe_2026_11_26" / "probe.json").read_text())
    line = next(x for x in probe["kinds_us"] if x["label"] == "hand, attention" and x["part"] == "step")
    names = {"product": "linear layers, 1x1", "ours": "norms, sums, GEGLU (ours)", "convolution": "3x3 convolutions"}
    kinds = {key: float(value) for key, value in line.items() if key not in ("label", "part", "kernels", "sum")}
    rows = [
        Bar(names.get(kind, kind), ((us / 1e3, BLUE),), f"{us / 1e3:.2f} ms, {us / line['sum']:.1%}")
        for kind, us in sorted(kinds.items(), key=lambda item: -item[1])
    ]
    return bars(f"Milliseconds of {STEP}'s kernels on an H100, optimized, fp16: {line['sum'] / 1e3:.2f}", rows)


# ---- rooflines


def _kernels(measured: Mapping[tuple[str, str], float], bytes_share: float) -> list[Kernel]:
    shown = (
        ("conv3x3", "64x64"),
        ("conv3x3", "8x8"),
        ("self-attention", "64x64"),
        ("feed-forward", "64x64"),
        ("attention proj", "16x16"),
        ("cross-attention", "64x64"),
        ("time embedding", "8x8"),
    )
    found = []
    for kind, grid in shown:
        calls = [call for call in work.step_calls() if (call.kind, call.grid) == (kind, grid)]
        work_done, size = sum(call.flops for call in calls), sum(call.bytes for call in calls) * bytes_share
        seconds = measured.get((kind, grid), float("nan"))
        found.append(Kernel(f"{kind} {grid}", work_done / size, work_done / seconds))
    return found


def roofline_cpu() -> Drawing:
    measured = {(line["kind"], line["grid"]): float(line["measured_ms"]) / 1e3 for line in facts.roofline()}
    return _roofline("Two cores with AVX2, fp32, plain", _kernels(measured, 1), facts.ceilings()["CPU, AVX2"])


def roofline_gpu() -> Drawing:
    return _roofline("One H100, fp16: the floors", _kernels({}, 0.5), facts.ceilings()["H100"])


def _roofline(title: str, kernels: list[Kernel], ceilings: Ceilings) -> Drawing:
    return roofline(f"{title}; {STEP}", kernels, ceilings.flops, ceilings.bytes)


# ---- the project's own ladder


def h100_rungs() -> list[Rung]:
    return rungs(read_csv(RESULTS / "h100" / "ladder.csv"), LABELS | {"base": "+ cuda-graph, async-noise"})


def history() -> Drawing:
    """Before there was a ladder, the two numbers that the project began with; after it, what is not exact."""
    rows = {line["row"]: line for line in read_csv(RESULTS / "h200" / "approximate" / "approximate.csv")}
    nan = float("nan")
    first = [Rung("T4, as it began", 33.0), Rung("A10, as it began", 4.7, nan, nan, follows=False)]
    ladder = h100_rungs()
    ladder[0] = Rung(f"H100: {ladder[0].label}", ladder[0].seconds, ladder[0].low, ladder[0].high, follows=False)
    last = [
        Rung("H200: all of these", float(rows["base"]["picture_s"]), follows=False),
        Rung("+ deepcache=3, approximate", float(rows["+ deepcache=3"]["picture_s"])),
    ]
    return staircase("Seconds of a picture, 512x512, 50 steps, logarithmic", [*first, *ladder, *last], log=True)


def nearest(drawn_in: Path) -> Drawing:
    """Approximate rows on an H200, each with what it draws."""
    drawn = pictures.read(drawn_in)
    points = approximate(read_csv(RESULTS / "h200" / "approximate" / "approximate.csv"))
    below = "times as fast as --opt exact alone; dB: median of 16 pictures of the demo model"
    return nearness("Approximate, on an H200", [_with_thumbnail(p, drawn_in, drawn) for p in points], below)


def _with_thumbnail(point: Point, drawn_in: Path, drawn: Mapping[str, dict]) -> Point:
    name = point.label.removeprefix("+ ").partition("=")[0]
    if "psnr_db" not in drawn.get(name, {}) or point.label == "+ deepcache=2":
        return point
    return Point(point.label, point.speedup, point.low, point.high, point.decibels, pictures.thumbnail(drawn_in, name))

"""The tables of the front pages."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch

from bench.common import read_csv
from bench.gains import RESULTS
from bench.guide import chapters, facts, optimization_page
from bench.report import markdown
from sd.optimizations.registry import PRESETS, catalog


def optimizations(drawn: Mapping[str, dict]) -> str:
    """All of them in the order of their stages, with the best that was measured."""
    rows = []
    for name, one in catalog().items():
        picture = drawn.get(name, {})
        far = (
            ""
            if "psnr_db" not in picture
            else "the same bytes"
            if picture["psnr_db"] is None
            else f"{picture['psnr_db']:.0f} dB"
        )
        rows.append(
            (f"[{name}](opts/{name}.md)", "exact" if one.exact else "approximate", gained(name), far, one.summary)
        )
    return markdown(("", "", "times as fast, from worst to best", "our fox", "what it does"), rows)


def gained(name: str) -> str:
    """In time; of what was only measured in memory, in that: `8.10 GiB to 6.90 GiB (CPU, AVX2)`"""
    if not (found := facts.measured(name)) and (saved := facts.saved(name)):
        least = min(saved, key=lambda m: m.gib[1] / m.gib[0])
        return f"memory: {least.gib[0]:.2f} to {least.gib[1]:.2f} GiB ({least.machine})"
    return gains(found)


def gains(found: list[facts.Measured]) -> str:
    """`0.93x (H200) to 1.02x (CPU, AVX-512)`"""
    ordered = sorted(found, key=lambda m: m.ratio)
    ends = list(dict.fromkeys(f"{m.ratio:.2f}x ({_where(m)})" for m in (*ordered[:1], *ordered[-1:])))
    return " to ".join(ends) or "not measured yet"


def _where(one: facts.Measured) -> str:
    """The machine, and what was switched on in the same row: the gain is of all of them."""
    joined = str(one.entry["joined"]).replace(",", ", ")
    return f"{one.machine}, with {joined}" if joined else one.machine


def presets() -> str:
    """What each stands for, by device."""
    rows = []
    for device, dtype in (("cuda", torch.float16), ("cpu", torch.float32)):
        pipe = SimpleNamespace(device=torch.device(device), dtype=dtype)
        for name in ("exact", "fast", "original"):
            rows.append((f"`{name}`", "an NVIDIA GPU" if device == "cuda" else "a CPU", _linked(PRESETS[name](pipe))))
    rows.insert(3, ("`cpu`", "a CPU", "what `exact` is on a CPU"))
    rows.append(("`default`", "any", "`exact`, where the model is large enough to pay the preparation back"))
    return markdown(("preset", "on", "stands for"), rows)


def _linked(names) -> str:
    return ", ".join(f"[{name}](opts/{name.partition('=')[0]}.md)" for name in names)


def spread() -> str:
    """How far the plain pipeline is from itself, wherever it was timed in pairs."""
    rows = []
    for path in sorted(RESULTS.rglob("speed.csv")):
        for line in read_csv(path):
            if line["opts"] == "none" and line["speedup"]:
                rows.append(_spread_row(path, line))
    columns = ("machine", "picture", "pairs", "seconds [quartiles]", "plain over plain: 1 is right")
    return markdown(columns, rows)


def _spread_row(path: Path, line: Mapping[str, str]) -> tuple[str, ...]:
    folder = path.relative_to(RESULTS).parts[0]
    machine = next(name for name, folders in facts.MACHINES.items() if folder in folders)
    seconds, low, high = (float(line[f"picture_s{q}"]) for q in ("", "_q1", "_q3"))
    ratio, less, more = (float(line[f"speedup{q}"]) for q in ("", "_q1", "_q3"))
    return (
        f"{machine} ([file](../../{path.relative_to(RESULTS.parents[1]).as_posix()}))",
        f"{line['size']}x{line['size']}, {line['steps']} steps, {line['dtype']}",
        line["pairs"],
        f"{seconds:.3g} [{low:.3g}, {high:.3g}]",
        f"{ratio:.2f} [{less:.2f}, {more:.2f}]",
    )


PRECISIONS = ("fp16", "bf16", "cpu-bf16", "cpu-int8", "int8-weights", "int8-dynamic", "int8-static")


def precision(drawn: Mapping[str, dict]) -> str:
    rows = []
    for name in PRECISIONS:
        looks = [m for m in facts.measured(name) if "psnr_db" in m.entry]
        median = "; ".join(dict.fromkeys(f"{m.entry['psnr_db']:.1f} ({m.machine})" for m in looks))
        if name == "fp16":
            median = f"{float(facts.fidelity('none', 'h100')['psnr_db']):.1f} (H100)"
        rows.append(
            (f"[{name}](opts/{name}.md)", chapters.read(name).sentence, f"{drawn[name]['psnr_db']:.1f}", median)
        )
    columns = ("", "what", "our fox, dB", "median of 16 pictures, dB")
    sheets = "\n\n".join(f"![plain, {name}, difference](pictures/{name}.webp)" for name in PRECISIONS[:4])
    return f"{markdown(columns, rows)}\n\n{sheets}"


def sheet(name: str, drawn: Mapping[str, dict]) -> str:
    return optimization_page.sheet(name, drawn[name]).replace("(../", "(")

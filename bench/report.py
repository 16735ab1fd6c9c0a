"""The ladder as a table on the terminal and as one plot of speed against fidelity."""

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.common import print_table
from bench.rungs import RERUN

log = logging.getLogger(__name__)

Result = Mapping[str, str]


def print_ladder(results: Sequence[Result]) -> None:
    """Each row's speed and looks; what was not measured is blank."""
    first = results[0]
    title = f"{first['size']}x{first['size']}, {first['steps']} steps, batch {first['batch']}, {first['sampler']}"
    title = f"{title}, {first['dtype']}, {first['device']}, torch {first['torch']}, commit {first['commit']}"
    print_table(title, [_line(result) for result in results])
    for result in results:
        if trouble := "; ".join(filter(None, (result["problems"], result["error"]))):
            print(f"{result['row']}: {trouble}")


def _line(r: Result) -> dict[str, str]:
    return {
        "row": r["row"],
        "exact": "" if r["opts"] == RERUN.key else "yes" if r["exact"] == "1" else "no",
        "step ms": _ms(r["step_s"], r["step_s_q1"], r["step_s_q3"]),
        "picture s": _range(r["picture_s"], r["picture_s_q1"], r["picture_s_q3"]),
        "speed-up": _range(r["speedup"], r["speedup_q1"], r["speedup_q3"]),
        "compile s": r["compile_s"],
        "pays after": r["pays_after"].replace("inf", "never"),
        "peak GiB": r["peak_gib"],
        "MFU": f"{float(r['mfu']):.1%}" if r["mfu"] else "",
        "error: first": r["error_first"],
        "median": r["error_median"],
        "last": r["error_last"],
        "PSNR dB": r["psnr_db"],
        "SSIM": r["ssim"],
        "trouble": "yes" if r["problems"] or r["error"] else "",
    }


def _range(median: str, low: str, high: str) -> str:
    return f"{float(median):.4g} [{float(low):.4g}, {float(high):.4g}]" if median else ""


def _ms(*seconds: str) -> str:
    return _range(*(str(1000 * float(s)) if s else "" for s in seconds))


def plot_front(results: Sequence[Result], path: Path) -> None:
    """Speed-up against the latents' final error; rows that nothing beats in both are joined."""
    measured = [r for r in results if r["speedup"] and r["error_last"] and math.isfinite(float(r["error_last"]))]
    if not measured:
        return
    if not importlib.util.find_spec("matplotlib"):
        log.warning("no plot: pip install matplotlib")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5.5))
    speedups, errors = ([float(r[column]) for r in measured] for column in ("speedup", "error_last"))
    smallest = min((error for error in errors if error > 0), default=1e-8)
    errors = [max(error, smallest / 10) for error in errors]  # an error of 0 has no place on a logarithmic axis
    axes.plot(*zip(*front(list(zip(speedups, errors, strict=True))), strict=True), color="tab:gray", lw=1, zorder=0)
    for number, (x, y, row) in enumerate(zip(speedups, errors, measured, strict=True)):
        color = "tab:blue" if row["exact"] == "1" else "tab:orange"
        whiskers = [[x - float(row["speedup_q1"])], [float(row["speedup_q3"]) - x]]
        axes.errorbar(x, y, xerr=whiskers, fmt="o", color=color, markersize=13, lw=1, alpha=0.9, zorder=number + 1)
        axes.annotate(str(number), (x, y), ha="center", va="center", color="white", fontsize=8, zorder=number + 1.5)
        axes.text(1.02, 0.97 - 0.06 * number, f"{number}  {row['row']}", transform=axes.transAxes, va="top", fontsize=9)
    axes.set(yscale="log", xlabel="speed-up of a picture over the plain pipeline: median and quartiles of the pairs")
    axes.set_ylabel("relative error of the final latents against plain fp32")
    axes.set_title(f"{results[0]['device']}, {results[0]['dtype']}: blue exact, orange approximate", fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (speed, error) that no other beats in both, from slow to fast."""
    best, kept = math.inf, []
    for speed, error in sorted(points, key=lambda point: (-point[0], point[1])):
        if error < best:
            kept.append((speed, error))
            best = error
    return kept[::-1]

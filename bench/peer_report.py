"""The engines side by side: a table on the terminal, the same in Markdown, and bars of their speed-ups."""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.common import print_table

log = logging.getLogger(__name__)

Row = Mapping[str, str]
PARTS = {"step": "one guided step", "decode": "VAE decode", "picture": "whole picture"}


def report(rows: Sequence[Row], plot: Path) -> None:
    """Print and plot rows of the CSV file, each with its engine's label; a row with an error holds nothing else."""
    measured = [row for row in rows if not row["error"]]
    for title, members in panels(rows).items():
        print_table(title, [cells(row) for row in members])
    if measured:
        print(markdown(measured))
        draw(measured, plot)


def panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by what they measured: each of these is a table, and a panel of the plot."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        title = f"{PARTS[row['part']]}, {row['size']}x{row['size']}"
        if row not in found.setdefault(title, []):
            found[title].append(row)
    return found


def cells(row: Row) -> dict[str, str]:
    if row["error"]:
        return {"engine": row["label"], "seconds": row["error"]} | dict.fromkeys(COLUMNS, "")
    return {
        "engine": row["label"],
        "seconds": spread(row, "median_s", "q1_s", "q3_s"),
        "speed-up": spread(row, "speedup", "speedup_q1", "speedup_q3"),
        "peak GiB": f"{float(row['peak_gib']):.1f}",
        "error": f"{float(row['relative_error']):.1e}" + "*" * row["engine"].startswith("sdcpp"),
        "first call s": f"{float(row['open_s']) + float(row['first_s']):.0f}",
        "rounds": row["rounds"],
    }


COLUMNS = ("speed-up", "peak GiB", "error", "first call s", "rounds")


def spread(row: Row, median: str, low: str, high: str) -> str:
    return f"{float(row[median]):.3g} [{float(row[low]):.3g}, {float(row[high]):.3g}]"


def markdown(rows: Sequence[Row]) -> str:
    """One line an engine, one column a panel: seconds (speed-up over the baseline), peak of memory, error."""
    by_panel = panels(rows)
    labels = dict.fromkeys(row["label"] for row in rows)
    lines = ["| engine |" + "".join(f" {title} |" for title in by_panel), "|---|" + "---|" * len(by_panel)]
    for label in labels:
        found = [next((row for row in members if row["label"] == label), None) for members in by_panel.values()]
        lines.append(f"| {label} |" + "".join(f" {brief(row)} |" for row in found))
    return "\n".join(lines)


def brief(row: Row | None) -> str:
    if row is None:
        return ""
    shown = cells(row)
    return f"{float(row['median_s']):.3g} s ({float(row['speedup']):.2f}x), {shown['peak GiB']} GiB, {shown['error']}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars of the speed-ups, quartiles as whiskers; ours in blue."""
    if not importlib.util.find_spec("matplotlib"):
        log.warning("no plot: pip install matplotlib")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_panel, first = panels(rows), rows[0]
    by_panel = {title: members for title, members in by_panel.items() if len(members) > 1} or by_panel  # to compare
    heights = [1 + 0.32 * len(members) for members in by_panel.values()]
    figure, all_axes = pyplot.subplots(
        len(heights), 1, figsize=(9, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axes, (title, members) in zip(all_axes[:, 0], by_panel.items(), strict=True):
        bars(axes, sorted(members, key=lambda row: float(row["speedup"])))
        axes.set_title(title, fontsize=10)
    device = f"{first['device']}, {first['threads']} threads, PyTorch {first['torch']}"
    axis = f"times as fast as {first['baseline']} in the same rounds; {device}"
    all_axes[-1, 0].set_xlabel(axis, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def bars(axes, rows: Sequence[Row]) -> None:
    middle, low, high = ([float(row[column]) for row in rows] for column in ("speedup", "speedup_q1", "speedup_q3"))
    whiskers = [[m - q for m, q in zip(middle, low, strict=True)], [q - m for m, q in zip(middle, high, strict=True)]]
    colors = ["tab:blue" if row["label"].startswith("ours") else "tab:gray" for row in rows]
    drawn = axes.barh([row["label"] for row in rows], middle, xerr=whiskers, color=colors, capsize=2)
    labels = [f"{float(row['speedup']):.2f}, {float(row['median_s']):.3g} s" for row in rows]
    axes.bar_label(drawn, labels, padding=6, fontsize=8)
    axes.margins(x=0.2)
    axes.tick_params(labelsize=8)

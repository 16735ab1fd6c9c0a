"""What each optimization gained, as bench/ladder.py wrote it into gains.json."""

import json
from pathlib import Path

FILE = Path(__file__).with_name("gains.json")


def gains(path: Path = FILE) -> dict[str, str]:
    """By name: "2.05x (CPU picture)", or beside others "2.05x to 2.20x (CPU picture)"; several joined by semicolons.

    Empty if the file is missing or damaged: a program runs without it.
    """
    try:
        entries = json.loads(path.read_text())
        return {name: "; ".join(map(_text, found)) for name, found in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _text(entry: dict) -> str:
    values = [entry["after"]] if entry["before"] is None else [entry["before"], entry["after"]]
    value = " to ".join(f"{v:.2f}x" if entry["unit"] == "x" else f"{v:#.3g} {entry['unit']}" for v in values)
    item = f"{entry['item']}: " if "=" in entry["item"] else ""
    joined = f" with {entry['joined'].replace(',', ', ')}" if entry["joined"] else ""
    looks = f", {entry['psnr_db']:.0f} dB" if "psnr_db" in entry else ""
    return f"{item}{value}{joined} ({entry['what']}{looks})"

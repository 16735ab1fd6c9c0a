"""What each optimization gained, as bench/ladder.py wrote it into gains.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("gains.json")


@dataclass(frozen=True)
class Gain:
    """One measurement: times as fast with the item as without it, all else the same.

    machine: `H100`, or the instruction set of a CPU, as `machine_of` says it. joined: what was switched on with it.
    psnr_db: of an approximate one's pictures to those of plain fp32, None where that was not measured.
    """

    item: str
    times: float
    machine: str
    joined: str = ""
    psnr_db: float | None = None

    def __str__(self) -> str:
        """`1.07x AVX2`, `2.04x AVX-512, 54 dB`, `tgate=5 1.24x AVX2, 18 dB`."""
        item = f"{self.item.partition('=')[2]}: " if "=" in self.item else ""
        looks = "" if self.psnr_db is None else f", {self.psnr_db:.0f} dB"
        joined = f" with {self.joined.replace(',', ', ')}" if self.joined else ""
        return f"{item}{self.times:.2f}x {self.machine}{looks}{joined}"


def gains(path: Path = FILE) -> dict[str, list[Gain]]:
    """By name. Empty if the file is missing or damaged: a program runs without it."""
    try:
        return {name: list(map(_gain, entries)) for name, entries in json.loads(path.read_text()).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return {}


def _gain(entry: Mapping) -> Gain:
    times = entry["after"] / entry["before"] if entry["before"] is not None else entry["after"]
    times = 1 / times if entry["unit"] == "s" else times
    machine = machine_of(entry["device"])
    return Gain(entry["item"], float(times), machine, entry["joined"], entry.get("psnr_db"))


def machine_of(device: str) -> str:
    """As bench/ names devices: `NVIDIA H100 80GB HBM3` is H100, `AMD EPYC avx512f` AVX-512, without flags AVX2."""
    words = device.split()
    if "NVIDIA" in words[:-1]:
        return words[words.index("NVIDIA") + 1]
    return "AMX" if "amx_bf16" in words else "AVX-512" if "avx512f" in words else "AVX2"

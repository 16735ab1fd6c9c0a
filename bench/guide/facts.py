"""What was measured, by machine: from bench/results, and from gains.json what is in no result that is kept here."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import common, gains
from bench.gains import RESULTS, Entry
from bench.roofline import Ceilings

MACHINES = {
    "H100": ("h100",),
    "H200": ("h200",),
    "CPU, AVX2": ("cpu2",),
    "CPU, AVX-512": ("cpu3", "cpu4"),
    "CPU, AMX": (),
}
"""The folders of bench/results that hold each machine's measurements."""


@dataclass(frozen=True)
class Measured:
    """One measurement of an optimization: on which machine, and the entry as bench/gains.py makes it."""

    machine: str
    entry: Entry

    @property
    def ratio(self) -> float:
        """Times as fast as without it."""
        before, after = self.entry["before"], self.entry["after"]
        if self.entry["unit"] == "s":
            return float(before) / float(after)
        return float(after) / float(before or 1)


@functools.cache
def _kept() -> tuple[Measured, ...]:
    found = []
    for machine, folders in MACHINES.items():
        for folder in folders:
            paths = sorted((RESULTS / folder).rglob("speed.csv"))
            entries = [entry for path in paths for entry in gains.of_ladder(path)]
            probes = sorted((RESULTS / folder).rglob("probe.json"))
            entries += [entry for path in probes for entry in gains.of_probe(path)]
            found += [Measured(machine, entry) for entry in entries]
    return tuple(found)


def measured(name: str, file: Path = gains.FILE) -> list[Measured]:
    """All measurements of an optimization, machine by machine."""
    told = gains.read(file).get(name, [])
    kept = [one for one in _kept() if _family(one) == name and _counts(one, told)]
    known = [one.entry for one in kept]
    return [*kept, *(Measured(str(e["device"]), e) for e in told if e not in known), *_of_dtype(name)]


def _of_dtype(name: str) -> list[Measured]:
    """Of fp16 and bf16: the plain picture in this dtype beside that in fp32, where one folder holds both."""
    dtype, found = {"fp16": "float16", "bf16": "bfloat16"}.get(name), []
    for machine, folder in ((m, f) for m, folders in MACHINES.items() for f in folders if dtype):
        for inner in sorted({path.parent for path in (RESULTS / folder).rglob("*.csv")}):
            plain = {line["dtype"]: line for path in sorted(inner.glob("*.csv")) for line in _plain_pictures(path)}
            if {"float32", dtype} <= plain.keys():
                found.append(Measured(machine, _compared(name, plain["float32"], plain[dtype])))
    return found


def _plain_pictures(path: Path) -> list[dict[str, str]]:
    return [line for line in common.read_csv(path) if line.get("opts") == "none" and line.get("picture_s")]


def _compared(name: str, before: dict[str, str], after: dict[str, str]) -> Entry:
    held = " ".join(
        f"--{key} {after[key]}" for key in ("weights", "size", "steps", "batch", "sampler", "dtype", "pairs")
    )
    pictures = {"before": float(before["picture_s"]), "after": float(after["picture_s"])}
    command = f"python bench/ladder.py --opts none {held}"
    return {"item": name, "beside": "", "joined": "", "unit": "s", "command": command} | pictures


@dataclass(frozen=True)
class Saved:
    """What a switch saves in memory: two rows of a memory.csv, without it and with it."""

    machine: str
    file: Path
    without: dict[str, str]
    with_it: dict[str, str]

    @property
    def gib(self) -> tuple[float, float]:
        return float(self.without["peak_gib"]), float(self.with_it["peak_gib"])


def saved(name: str) -> list[Saved]:
    """All measurements of the peak with an optimization, each beside the last row that lacks just this."""
    found = []
    for machine, folders in MACHINES.items():
        for path in (RESULTS / folder / "memory.csv" for folder in folders):
            rows = {(line["size"], gains.names_in(line["opts"])): line for line in common.read_csv(path)}
            for (size, names), line in rows.items():
                less = tuple(one for one in names if one.partition("=")[0] != name)
                if less != names and (size, less) in rows:
                    found.append(Saved(machine, path, rows[size, less], line))
    return found


def _family(one: Measured) -> str:
    return str(one.entry["item"]).partition("=")[0]


def _counts(one: Measured, told: Sequence[Entry]) -> bool:
    """Whether gains.json says it too, or has something else of another machine in its place: two CPUs can be of one
    name. What a later day on the same machine has replaced does not count."""
    mine = [e for e in told if _place(e) == _place(one.entry)]
    return not mine or one.entry in mine or one.machine not in {_machine_of(e) for e in mine}


def _place(entry: Entry) -> tuple:
    return entry["item"], entry["what"], entry["device"], entry["beside"]


def _machine_of(entry: Entry) -> str:
    return next((one.machine for one in _kept() if one.entry == entry), "")


@functools.cache
def ceilings() -> dict[str, Ceilings]:
    """The rates of a large matrix product and of a large copy, where both were measured: fp16 on the H100, fp32 on the
    CPU."""
    probe = json.loads((RESULTS / "h100" / "probe_2026_11_26" / "probe.json").read_text())["ceilings"][0]
    cpu = roofline()[0]
    return {
        "H100": Ceilings(probe["tflops"] * 1e12, probe["gb_s"] * 1e9),
        "CPU, AVX2": Ceilings(float(cpu["ceiling_tflops"]) * 1e12, float(cpu["ceiling_gbytes"]) * 1e9),
    }


@functools.cache
def roofline() -> list[dict[str, str]]:
    """A guided step at 512x512 on a CPU with AVX2, plain, by kind and grid."""
    return common.read_csv(RESULTS / "cpu2" / "roofline" / "roofline-unet-512-b1.csv")


def fidelity(opts: str, folder: str) -> dict[str, str]:
    """The last line of a folder's fidelity.csv for a row."""
    lines = [line for line in common.read_csv(RESULTS / folder / "fidelity.csv") if line["opts"] == opts]
    return lines[-1] if lines else {}

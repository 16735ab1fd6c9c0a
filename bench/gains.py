"""sd/optimizations/gains.json: what each optimization gained where it was measured, from the files of measurements.

    python bench/ladder.py --gains                       # the file anew from bench/results; measures nothing
    python bench/ladder.py --opts exact --update-gains   # a ladder, and its entries into the file

By name, a list of entries. `item` is the name with its value, if it had one; `what` was timed on `device`; `before`
and `after` are without and with it. In unit `x` they are times as fast as the plain picture beside it (`low`, `high`:
quartiles of after), in unit `s` seconds of a picture, as on CUDA, where a plain one takes as long as the host needs.
`before` is null if nothing else was on. `beside` is what else was on, `joined` what the same row switched on with it,
`psnr_db` how far an approximate one's pictures are from plain fp32.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import common
from bench.rungs import KNOBS
from sd.writing import write_whole

RESULTS = common.ROOT / "bench" / "results"
FILE = common.ROOT / "sd" / "optimizations" / "gains.json"
MOST_JOINED = 3
"""A row that switched more on at once says nothing about one of them."""

Names = tuple[str, ...]
Entry = dict[str, object]
Gains = dict[str, list[Entry]]


def recorded(results: Path = RESULTS) -> Gains:
    """From all results that are kept. What was measured twice on one machine is taken from the later day."""
    probes = [of_probe(path) for path in sorted(results.rglob("probe.json"))]
    ladders = [of_ladder(path) for path in sorted(results.rglob("speed.csv"))]
    gains: Gains = {}
    for found in sorted((*ladders, *probes), key=lambda entries: max((str(e["date"]) for e in entries), default="")):
        gains = update(gains, found)
    return gains


def update(gains: Gains, found: Sequence[Entry]) -> Gains:
    """Entries that were measured anew in place of those of the same item, timed thing and device."""
    anew = {_place(entry) for entry in found}
    kept = [entry for entries in gains.values() for entry in entries if _place(entry) not in anew]
    merged: Gains = {}
    for entry in (*kept, *found):
        merged.setdefault(_family(str(entry["item"])), []).append(entry)
    return dict(sorted(merged.items()))


def _place(entry: Entry) -> tuple:
    return entry["item"], entry["what"], entry["device"]


def read(path: Path = FILE) -> Gains:
    return json.loads(path.read_text()) if path.exists() else {}


def write(gains: Gains, path: Path = FILE) -> None:
    """One line an entry, so that a diff shows which of them changed."""
    lists = []
    for name, entries in gains.items():
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
        lists.append(f"  {json.dumps(name)}: [\n{lines}\n  ]")
    write_whole(path, ("{\n" + ",\n".join(lists) + "\n}\n").encode())


# ---- from the ladder's speed.csv, and fidelity.csv beside it


def of_ladder(path: Path) -> list[Entry]:
    """The entries of all rows that were measured; rows are compared with those of the same settings."""
    groups: dict[Names, dict[Names, dict[str, str]]] = {}
    for line in common.read_csv(path):
        if line["picture_s"]:
            held = tuple(line[key] for key in ("weights", "size", "steps", "batch", "sampler", "dtype", "device"))
            groups.setdefault(held, {})[names_in(line["opts"])] = line
    looks = {names_in(line["opts"]): line["psnr_db"] for line in common.read_csv(path.with_name("fidelity.csv"))}
    return [entry for rows in groups.values() for entry in _ladder_entries(rows, looks)]


def _ladder_entries(rows: Mapping[Names, Mapping[str, str]], looks: Mapping[Names, str]) -> list[Entry]:
    return [
        compared(item, base, names)
        | _ladder_values(rows[base], rows[names])
        | _looks(rows[names], names, looks)
        | _ladder_settings(rows[names], item, base)
        for item, base, names in steps_of(list(rows))
    ]


def _ladder_values(before: Mapping[str, str], after: Mapping[str, str]) -> Entry:
    column, unit = ("picture_s", "s") if after["cuda"] else ("speedup", "x")
    plain = before["opts"] == "none" and unit == "x"
    values: Entry = {"what": _what(after["device"], bool(after["cuda"])), "unit": unit}
    values |= {"before": None if plain else float(before[column]), "after": float(after[column])}
    if unit == "x":
        values |= {"low": float(after["speedup_q1"]), "high": float(after["speedup_q3"])}
    return values


def _looks(line: Mapping[str, str], names: Names, looks: Mapping[Names, str]) -> Entry:
    measured = line["exact"] == "0" and looks.get(names)
    return {"psnr_db": float(looks[names])} if measured else {}


def _ladder_settings(line: Mapping[str, str], item: str, base: Names) -> Entry:
    held = " ".join(
        f"--{key} {line[key]}" for key in ("weights", "size", "steps", "batch", "sampler", "dtype", "pairs")
    )
    command = f"python bench/ladder.py --base {','.join(base) or 'none'} --opts {item} --mode alone {held}"
    return _environment(line) | {"command": command}


# ---- from bench/gpu_probe.py's probe.json


def of_probe(path: Path) -> list[Entry]:
    """The entries of the probe's ladder, by its pictures of the DDPM sampler."""
    probe = json.loads(path.read_text())
    seconds = {line["label"]: line["picture_s"] for line in probe["pictures"] if line["sampler"] == "ddpm"}
    rows = {names_in(line["names"]): seconds.get(line["label"]) for line in probe.get("ladder", ())}
    (environment,) = probe["environment"]
    shared = _environment(environment) | {"command": "python -m bench.gpu_probe OUTDIR"}
    what = _what(environment["device"], bool(environment["cuda"]))
    return [
        compared(item, base, names)
        | {"what": what, "unit": "s", "before": _rounded(rows[base]), "after": _rounded(rows[names])}
        | shared
        for item, base, names in steps_of([names for names, value in rows.items() if value])
    ]


# ---- which row is compared with which


def steps_of(rows: Sequence[Names]) -> list[tuple[str, Names, Names]]:
    """(item, names without, names with) for every item of which a row tells the gain.

    A row is compared with the largest of the rows whose names it holds all; what it has beyond it is its gain.
    """
    steps = []
    for names in rows:
        base = max((other for other in rows if set(other) < set(names)), key=len, default=None)
        items = [name for name in names if base is not None and name not in base]
        if len(items) <= MOST_JOINED:
            steps += [(item, base, names) for item in items if _family(item) not in KNOBS]
    return steps


def compared(item: str, base: Names, names: Names) -> Entry:
    joined = [name for name in names if name not in base and name != item]
    return {"item": item, "beside": ",".join(base), "joined": ",".join(joined)}


def _what(device: str, cuda: bool) -> str:
    """`CPU picture`, `H100 picture`."""
    words = device.split() if cuda else ["", "CPU"]
    return f"{words[1] if len(words) > 1 else 'GPU'} picture"


def _environment(line: Mapping) -> Entry:
    return {key: line[key] for key in ("device", "torch", "date", "commit")} | {"threads": int(line["threads"])}


def _rounded(value: float) -> float:
    return float(common.cell(float(value)))


def names_in(opts: str) -> Names:
    return tuple(name for name in opts.split(",") if name not in ("", "none"))


def _family(item: str) -> str:
    return item.partition("=")[0]

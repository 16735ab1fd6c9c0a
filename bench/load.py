"""Load time and peak memory of .ckpt and .safetensors, fp32 and fp16, against a raw read of the same file.

    python -m bench.load [--dir FOLDER] [--repeats 3] [--cold] [--csv bench/results/load.csv]

SD 1.5's size with random weights is written into the folder (13 GB, removed again), unless --ckpt names files to
measure. Each load is a process of its own, timed after its imports; files are read once before, so that they are in
the system's cache, or dropped from it with --cold.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from sd import model_loader

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "load.csv"
CHUNK = 16 << 20


def main() -> None:
    args = parse_args()
    if args.one:
        print(json.dumps(load_once(Path(args.one[0]), args.one[1], torch.device(args.device))))
        return
    from bench.common import append_csv, print_table

    rows = []
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for path in args.ckpt or random_checkpoints(Path(folder)):
            for dtype in ("float32", "float16"):
                rows.append(measure(path, dtype, args))
                append_csv(args.csv, rows[-1])
            if not args.ckpt:
                path.unlink()
    hidden = {"date", "device", "python", "torch", "cuda", "triton", "dtype"}
    shown = [{key: str(value) for key, value in row.items() if key not in hidden} for row in rows]
    print_table("Loading a checkpoint (medians; GB = 1e9 bytes)", shown)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", type=Path, action="append", help="measure this file; may be repeated")
    parser.add_argument("--dir", type=Path, help="folder for the random checkpoints (default: the system's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="drop the file from the system's cache before each read")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=2, metavar=("FILE", "DTYPE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def random_checkpoints(folder: Path) -> Iterator[Path]:
    """SD 1.5 in each format and precision, written when it is its turn."""
    from bench.common import free_memory
    from bench.reference.weights import random_models, write_ckpt, write_safetensors
    from sd.config import SD15

    for dtype in (torch.float32, torch.float16):
        for write, suffix in ((write_ckpt, "ckpt"), (write_safetensors, "safetensors")):
            path = folder / f"{str(dtype).removeprefix('torch.')}.{suffix}"
            write(path, random_models(SD15, dtype=dtype))
            free_memory(torch.device("cpu"))  # or the freed weights stay with this process, beside the measured one
            yield path


def measure(path: Path, dtype: str, args: argparse.Namespace) -> dict[str, str | float]:
    """One row: raw reads and loads in turn, so that a drift of the machine hits both."""
    from bench.common import environment

    raw_read(path)
    raws, loads = [], []
    for _ in range(args.repeats):
        prepare(path, args.cold)
        raws.append(raw_read(path))
        prepare(path, args.cold)
        loads.append(load_in_child(path, dtype, args.device))
    raw = statistics.median(raws)
    medians = {key: statistics.median(load[key] for load in loads) for key in loads[0]}
    return {
        "file": path.name,
        "file_gb": round(path.stat().st_size / 1e9, 3),
        "load_as": dtype,
        "cache": "cold" if args.cold else "warm",
        "raw_read_s": round(raw, 3),
        "load_s": round(medians["seconds"], 3),
        "load_over_raw": round(medians["seconds"] / raw, 2),
        "weights_gb": round(medians["weights"] / 1e9, 3),
        "peak_gb": round(medians["peak"] / 1e9, 3),
        "peak_over_weights": round(medians["peak"] / medians["weights"], 3),
        "anonymous_gb": round(medians["anonymous"] / 1e9, 3),
        "repeats": args.repeats,
        **environment(torch.device(args.device), getattr(torch, dtype)),
    }


def prepare(path: Path, cold: bool) -> None:
    if cold:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def raw_read(path: Path) -> float:
    """Seconds to read the file into one buffer, over and over."""
    buffer = bytearray(CHUNK)
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def load_in_child(path: Path, dtype: str, device: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.load", "--device", device, "--one", str(path.resolve()), dtype]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def load_once(path: Path, dtype: str, device: torch.device) -> dict[str, float]:
    """Seconds of a load in this process, and bytes: of the weights, the resident peak and what of it is no file."""
    torch.empty(1, device=device)
    before = resident()
    start = time.perf_counter()
    _, *models = model_loader.load(path, device=device, dtype=getattr(torch, dtype))
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    after = resident()
    return {
        "seconds": seconds,
        "weights": sum(p.nbytes for model in models for p in model.parameters()),
        "peak": after["VmHWM"] - before["VmRSS"],
        "anonymous": after["RssAnon"] - before["RssAnon"],
    }


def resident() -> dict[str, int]:
    """Bytes of this process in memory: at most so far (VmHWM), now (VmRSS), and of that not mapped files (RssAnon)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS", "RssAnon")}


if __name__ == "__main__":
    main()

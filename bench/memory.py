"""The most memory that a process holds while it draws a picture, by what is switched on.

    python bench/memory.py none page-out                       # SD 1.5's shapes, 512x512
    python bench/memory.py cpu cpu,vae-tiling --size 768

Each row is the command itself, as a person types it, over a file of random weights in fp32: its peak is the resident
set's as the system counted it, with Python, its libraries and the pages that are mapped from the file. One step and the
decoder stand for a picture: another step holds no more. What is switched on takes turns, round by round; the row has
the medians, and the peaks' least and most.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    args = parse_args()
    if args.write:
        write(args.write)
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        # In other processes: Linux counts the peak of who starts one as that one's own.
        file = Path(folder, "random.safetensors")
        subprocess.run([sys.executable, __file__, "--write", str(file)], check=True)
        found = {opts: [] for opts in args.opts}
        for _ in range(args.rounds):
            for opts, runs in found.items():
                runs.append(drawn(command(file, opts, args.size, Path(folder, "picture.png"))))
    rows = [row(opts, args.size, runs) for opts, runs in found.items()]
    record(rows, args.out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("opts", nargs="*", default=["none", "page-out"], help="what --opt is given, a row each")
    parser.add_argument("--size", type=int, default=512, metavar="PIXELS", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(%(default)s)")
    parser.add_argument("--dir", type=Path, help="for the weights, 4.3 GB that are removed again (the system's)")
    parser.add_argument("--out", type=Path, default=Path("out/memory.csv"), metavar="CSV", help="(%(default)s)")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write(file: Path) -> None:
    from bench.reference.weights import random_models, write_safetensors
    from sd.config import SD15

    write_safetensors(file, random_models(SD15))


def command(file: Path, opts: str, size: int, picture: Path) -> list[str]:
    where = ["--ckpt", str(file), "--out", str(picture), "--overwrite"]
    what = ["--prompt", "a red apple", "--seed", "1", "--steps", "1", "--height", str(size), "--width", str(size)]
    return [sys.executable, str(ROOT / "sd/inference.py"), *where, *what, "--device", "cpu", "--opt", opts]


def drawn(words: Sequence[str]) -> tuple[float, float]:
    """Run a command -> its peak in bytes, and its seconds. Raises RuntimeError where it fails."""
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(words, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(words)}: {said.read().decode(errors='replace').strip()[-500:]}")
    return usage.ru_maxrss * 1024.0, seconds


def row(opts: str, size: int, runs: Sequence[tuple[float, float]]) -> dict[str, object]:
    peaks, seconds = zip(*runs, strict=True)
    gib = {"peak_gib": statistics.median(peaks), "peak_gib_min": min(peaks), "peak_gib_max": max(peaks)}
    return {
        "opts": opts,
        "size": size,
        "steps": 1,
        "rounds": len(runs),
        **{name: f"{value / 2**30:.3g}" for name, value in gib.items()},
        "command_s": f"{statistics.median(seconds):.3g}",
    }


def record(rows: Sequence[dict[str, object]], file: Path) -> None:
    """Into the file and onto the screen; torch only now, whose size would be each command's."""
    import torch

    from bench.common import append_csv, environment, print_table

    for one in rows:
        append_csv(file, one | environment(torch.device("cpu"), torch.float32))
    print_table("Peak memory of a picture (GiB = 2^30 bytes)", [{k: str(v) for k, v in one.items()} for one in rows])


if __name__ == "__main__":
    main()

"""Thousands of damaged checkpoints end in a model or in a CheckpointError, soon and in little memory."""

import io
import os
import random
import resource
import subprocess
import sys
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bench.reference.weights import tiny_config, write_ckpt, write_safetensors
from sd import model_loader
from sd.checkpoints.errors import CheckpointError
from tests.checkpoints.common import ROOT
from tests.weights import random_models

FUZZED = tiny_config(
    text={"vocab_size": 16, "layers": 1, "max_length": 4},
    unet={"channel_mult": (1,), "attention_levels": ()},
    vae={"ch_mult": (1,)},
)
FUZZ_FORMATS = ("saved", "safetensors", "zip", "legacy")


def fuzz_seeds(folder: Path) -> dict[str, bytes]:
    """One small checkpoint of each format."""
    models = random_models(FUZZED, dtype=torch.float16)
    model_loader.save(folder / "saved", FUZZED, *models)
    write_safetensors(folder / "safetensors", models)
    write_ckpt(folder / "zip", models)
    write_ckpt(folder / "legacy", models, legacy=True)
    return {name: (folder / name).read_bytes() for name in FUZZ_FORMATS}


def mutated(data: bytes, rng: random.Random, structure: int) -> bytes:
    """Up to 8 changes, most of them in the first `structure` bytes: flips, cuts, splices, copies, digits."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        end = max(1, min(len(data), structure if rng.random() < 0.8 else len(data)))
        at, length = rng.randrange(end), rng.choice((1, 2, 4, 8, 64))
        match rng.randrange(6):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + length] = rng.randbytes(length)
            case 2:
                del data[at : at + length]
            case 3:
                other = rng.randrange(end)
                data[at:at] = data[other : other + length]
            case 4:
                data[at : at + length] = rng.choice((b"\0", b"\xff")) * length
            case 5:
                digits = [i for i in range(end) if 48 <= data[i] < 58] or [at]
                data[rng.choice(digits)] = rng.choice(b"0123456789")
        if not data:
            break
    return bytes(data[: rng.randrange(len(data))] if data and rng.random() < 0.05 else data)


def with_mutated_pickle(data: bytes, rng: random.Random) -> bytes:
    """Change the pickle in a zip file and keep its check sums right, so that the change is not noticed by them."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as changed:
        for info in source.infolist():
            record = source.read(info)
            if info.filename.endswith("data.pkl"):
                record = mutated(record, rng, len(record))
            changed.writestr(info.filename, record)
    return target.getvalue()


def mutant(name: str, data: bytes, rng: random.Random) -> bytes:
    if name == "zip":
        if rng.random() < 0.5:
            return with_mutated_pickle(data, rng)
        tail = len(data) - data.rindex(b"PK\x01\x02")
        return mutated(data[::-1], rng, 300 * tail)[::-1] if rng.random() < 0.3 else mutated(data, rng, len(data))
    header = 8 + int.from_bytes(data[:8], "little") if name != "legacy" else data.index(b"conv_out.bias") + 2000
    return mutated(data, rng, header)


def fuzz(count: int, seed: int, folder: Path) -> Counter:
    """Load `count` mutants. Anything but a model or a CheckpointError goes up; the slowest and the peak are checked."""
    seeds = fuzz_seeds(folder)
    for name in seeds:
        model_loader.load(folder / name)
    start_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends = Counter()
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        name = FUZZ_FORMATS[i % len(FUZZ_FORMATS)]
        path = folder / "mutant"
        path.write_bytes(mutant(name, seeds[name], rng))
        start = time.process_time()  # not the clock: other processes must not fail this guard against hanging
        ends[name, fuzz_one(path, i)] += 1
        seconds = time.process_time() - start
        assert seconds < 10, f"mutant {i} took {seconds:.0f} s"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start_memory
    assert grown < 300_000, f"memory grew by {grown} kB"
    return ends


def fuzz_one(path: Path, number: int) -> str:
    try:
        _, *models = model_loader.load(path)
    except CheckpointError:
        return "error"
    except BaseException as error:
        raise AssertionError(f"mutant {number}: {type(error).__name__}: {error}") from error
    assert all(p.isfinite().all() for model in models for p in model.parameters())
    return "model"


def run_fuzz(count: int, seed: int, folder: Path) -> str:
    """In another process: a crash is a failure, not the end of the tests."""
    code = (
        "from pathlib import Path\n"
        "from tests.checkpoints.test_fuzzed_checkpoints import fuzz\n"
        f"print(fuzz({count}, {seed}, Path('.')))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1"}
    folder.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_fuzzed_checkpoints(tmp_path):
    ends = run_fuzz(300, seed=0, folder=tmp_path)
    assert "error" in ends
    assert "model" in ends


@pytest.mark.full
def test_ten_thousand_fuzzed_checkpoints(tmp_path):
    with ThreadPoolExecutor(2) as processes:
        halves = [processes.submit(run_fuzz, 5_000, seed, tmp_path / str(seed)) for seed in (1, 2)]
    print([half.result() for half in halves])

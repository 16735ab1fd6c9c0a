"""Weights are the mapped file where they can be, and take no second copy in memory where they cannot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.reference.weights import random_models, write_ckpt, write_safetensors
from sd import model_loader
from sd.config import SD15
from tests.checkpoints.common import ROOT, assert_same


def test_changing_a_mapped_weight_leaves_the_file_alone(tmp_path, models):
    for path in (tmp_path / "weights.safetensors", tmp_path / "weights.ckpt"):
        write_safetensors(path, models) if path.suffix == ".safetensors" else write_ckpt(path, models)
        before = path.read_bytes()
        model_loader.load(path)[2].out[2].weight.add_(1)
        assert path.read_bytes() == before


MEASURE = """
import json, sys, torch
from sd import model_loader
def memory():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon")}
before = memory()
config, *models = model_loader.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]), ema=sys.argv[3] == "ema")
weights = sum(p.nbytes for m in models for p in m.parameters())
print(json.dumps({"weights": weights, "before": before, "after": memory()}))
"""


def measured(path: Path, dtype: str, ema: bool = False) -> dict:
    command = [sys.executable, "-c", MEASURE, str(path), dtype, "ema" if ema else "live"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_memory_at_full_size(tmp_path, kind):
    models = random_models(SD15)
    path = tmp_path / f"weights.{kind}"
    write_ckpt(path, models) if kind == "ckpt" else write_safetensors(path, models)
    assert_same(model_loader.load(path)[1:], models)
    del models
    mapped = measured(path, "float32")
    assert mapped["weights"] == 4 * 1_066_235_307
    assert mapped["after"]["VmHWM"] < 1.25 * mapped["weights"]
    half = measured(path, "float16")
    assert half["after"]["VmHWM"] - half["before"]["VmHWM"] < 1.25 * half["weights"]
    path.unlink()

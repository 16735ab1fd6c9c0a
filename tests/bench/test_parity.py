"""Ours beside diffusers from one noise: what is compared, and that a difference is found before anything is timed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import common, parity, vs_diffusers
from bench.parity import Drawn
from bench.reference.numbers import noise, relative_error
from tests.weights import tiny_pipeline

PARTS = ["step", "latents", "picture"]


def compare(checkpoint: Path, out: Path, *arguments: str) -> int:
    command = ["--weights", str(checkpoint), "--device", "cpu", "--size", "16", "--steps", "2", "--rounds", "1"]
    return vs_diffusers.main([*command, "--out", str(out), *arguments])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_noise_gives_the_same_picture(dtype):
    errors = parity.errors(tiny_pipeline(dtype), Drawn(64, steps=2, batch=2))
    assert list(errors) == PARTS
    assert all(error < parity.BOUNDS[dtype][part] for part, error in errors.items())
    assert errors["latents"] > 0  # not one latent compared with itself


def test_noise_of_another_sequence_is_an_error(monkeypatch):
    """What torch.randn in half precision gives in some versions: the same seed, other numbers."""
    ours, first = parity.our_picture, parity.first_latents
    other = lambda config, drawn, dtype: noise(*first(config, drawn, dtype).shape, seed=parity.SEED + 1).to(dtype)  # noqa: E731

    def our_picture(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(parity, "first_latents", other)
            return ours(*arguments, **options)

    monkeypatch.setattr(parity, "our_picture", our_picture)
    pipe = tiny_pipeline(torch.bfloat16)
    errors = parity.errors(pipe, Drawn(64, steps=2, batch=1))
    assert errors["latents"] > 4 * parity.BOUNDS[torch.bfloat16]["latents"]


def test_the_noise_is_fp32_rounded():
    config = tiny_pipeline().config
    whole = parity.first_latents(config, Drawn(64, 1, 3), torch.float32)
    assert whole.shape == (3, 4, 8, 8)
    assert torch.equal(whole, torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(parity.SEED)))
    assert torch.equal(parity.first_latents(config, Drawn(64, 1, 3), torch.float16), whole.half())


@pytest.mark.parametrize("error", [2e-4, float("nan"), float("inf")])
def test_over_the_bound_nothing_is_timed(shallow_checkpoint, tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(parity, "errors", lambda *_: {"step": 0.0, "latents": error, "picture": 1e-6})
    monkeypatch.setattr(vs_diffusers, "compete", lambda *_: pytest.fail("timed"))
    assert compare(shallow_checkpoint, tmp_path, "--pipeline") == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("vs_diffusers.py: no parity with diffusers in float32 on ")
    assert "latents differs by" in lines[-1]
    assert [line["passed"] for line in common.read_csv(tmp_path / "parity.csv")] == ["1", "0", "1"]
    assert not (tmp_path / "vs_diffusers.csv").exists()


def test_parity_alone_goes_through_all_dtypes(shallow_checkpoint, tmp_path, monkeypatch, capsys):
    """One that differs does not hide those after it."""
    bad = {"float32": 1.0, "float16": 0.0, "bfloat16": 1.0}
    monkeypatch.setattr(parity, "errors", lambda pipe, _: {"step": bad[str(pipe.dtype).removeprefix("torch.")]})
    monkeypatch.setattr(vs_diffusers, "compete", lambda *_: pytest.fail("timed"))
    assert compare(shallow_checkpoint, tmp_path, "--parity-only") == 1
    lines = common.read_csv(tmp_path / "parity.csv")
    assert [(line["dtype"], line["passed"]) for line in lines] == [
        ("float32", "0"),
        ("float16", "1"),
        ("bfloat16", "0"),
    ]
    message = capsys.readouterr().err
    assert "in float32" in message
    assert "in bfloat16" in message
    assert "in float16" not in message


def test_versus_diffusers(shallow_checkpoint, tmp_path):
    assert compare(shallow_checkpoint, tmp_path) == 0
    assert compare(shallow_checkpoint, tmp_path, "--pipeline", "--opts", "exact") == 0
    checked = common.read_csv(tmp_path / "parity.csv")
    assert [line["part"] for line in checked] == ["step", *PARTS]
    assert all(line["passed"] == "1" for line in checked)
    lines = common.read_csv(tmp_path / "vs_diffusers.csv")
    names = ["ours, plain", "diffusers, eager"]
    assert [line["contestant"] for line in lines] == [*names, *names, "ours, exact"]
    assert all(float(line["relative_error"]) < 1e-3 for line in lines)
    assert all(float(line["median_s"]) > 0 for line in lines)


def test_bounds_are_below_what_other_noise_makes():
    a, b = noise(1, 4, 8, 8, seed=0), noise(1, 4, 8, 8, seed=1)
    assert max(bound for bounds in parity.BOUNDS.values() for bound in bounds.values()) < relative_error(a, b) / 4


# ---- bench/gpu.sh

SCRIPT = common.ROOT / "bench" / "gpu.sh"
PYTHON = """#!/bin/bash
# In place of Python: parity passes or not, everything else passes.
echo "called: $*"
case "$*" in *--parity-only*) exit {code} ;; esac
"""


def gpu_script(folder: Path, code: int, *parts: str, seconds: int = 1000) -> subprocess.CompletedProcess:
    python = folder / "python"
    python.write_text(PYTHON.format(code=code))
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "SMALL": "1", "PYTHON": str(python), "SECONDS_LEFT": str(seconds)}
    command = ["bash", str(SCRIPT), str(folder / "out"), *parts]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def called(result: subprocess.CompletedProcess) -> list[str]:
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("called: ")]
    return [next(word for word in words if word.startswith("bench/")) for words in lines if "-c" not in words]


def test_parity_is_always_the_first_part(tmp_path):
    result = gpu_script(tmp_path, 0, "ladder")
    assert called(result) == ["bench/vs_diffusers.py", "bench/ladder.py"]
    assert (result.returncode, result.stderr) == (0, "")


def test_no_parity_is_the_last_word(tmp_path):
    """The rest is measured, and nothing is forgotten, now or when the script is called again."""
    for rest in (["bench/ladder.py"], []):
        result = gpu_script(tmp_path, 1, "ladder")
        assert called(result) == ["bench/vs_diffusers.py", *rest]
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1].startswith("gpu.sh: NO PARITY WITH DIFFUSERS")
    assert gpu_script(tmp_path, 1, "roofline", seconds=0).returncode == 1
    assert gpu_script(tmp_path, 0, "ladder").returncode == 0


def test_no_time_for_parity_is_said_as_well(tmp_path):
    result = gpu_script(tmp_path, 0, "ladder", seconds=0)
    assert (called(result), result.returncode) == ([], 75)
    assert "it was not seen" in result.stderr


def test_gpu_script_says_that_there_is_no_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command, environment = ["bash", str(SCRIPT), str(tmp_path / "out")], {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert result.stderr.startswith("gpu.sh: PyTorch sees no CUDA device")

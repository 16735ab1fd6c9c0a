"""The command line as a person types it, in processes of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from sd.images import read_parameters
from sd.inference import SAMPLERS
from tests.checkpoints import random_models, tiny_config, write_ckpt

PROGRAM = Path(__file__).resolve().parent.parent / "sd" / "inference.py"


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    """A small model as pipe.save writes it: its configuration is in the file."""
    from sd.pipeline import StableDiffusion

    config = tiny_config()
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    StableDiffusion(config, *random_models(config, seed=0)).save(path)
    return path


def run(*arguments: object, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **(env or {})})


def test_a_picture_from_any_directory(ckpt, tmp_path):
    result = run("--ckpt", ckpt, "--prompt", "a fox", "--steps", 3, "--seed", 5, "--out", "fox.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "fox.png") as image:
        assert image.size == (tiny_config().image_size,) * 2
    parameters = read_parameters(tmp_path / "fox.png")
    assert parameters["prompt"] == "a fox"
    assert parameters["seed"] == 5
    assert {"negative_prompt", "steps", "cfg_scale", "sampler", "height", "width", "dtype", "model"} <= set(parameters)
    for word in ("seed 5", "load", "text", "denoise", "decode", "fox.png"):
        assert word in result.stdout
    assert "it/s" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["fox.png"]


def test_the_same_command_writes_the_same_bytes(ckpt, tmp_path):
    for name in ("a.png", "b.png"):
        run("--ckpt", ckpt, "--prompt", "x", "--steps", 2, "--seed", 1, "--out", name, cwd=tmp_path)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_several_pictures(ckpt, tmp_path):
    result = run("--ckpt", ckpt, "--prompt", "x", "--steps", 1, "--seed", 3, "--num-images", 2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    seeds = [read_parameters(tmp_path / f"output-{i}.png")["seed"] for i in (1, 2)]
    assert seeds == [3, 4]


def test_weights_from_the_environment(ckpt, tmp_path):
    result = run("--prompt", "x", "--steps", 1, cwd=tmp_path, env={"SD_CKPT": str(ckpt)})
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps must be from 1 to 1000"),
        (["--steps", "1001"], "steps must be from 1 to 1000"),
        (["--cfg-scale", "nan"], "cfg_scale must be a finite number"),
        (["--strength", "0", "--steps", "2"], "strength must be over 0"),
        (["--height", "100"], "nearest: height"),
        (["--seed", "-1"], "seed must be from 0"),
        (["--num-images", "0"], "--num-images must be at least 1"),
        (["--out", "nowhere/x.png"], "there is no folder nowhere"),
        (["--out", "."], "is a folder"),
        (["--device", "warp"], "--device: 'warp'"),
        (["--device", "cuda:99"], "--device: 'cuda:99'"),
        (["--init-image", "missing.png"], "missing.png"),
        (["--ckpt", "missing.safetensors"], "missing.safetensors"),
        (["--ckpt", "."], "folder"),
        (["--ckpt", "garbage.ckpt"], "garbage.ckpt"),
    ],
)
def test_mistakes_are_one_line(ckpt, tmp_path, arguments, message):
    (tmp_path / "garbage.ckpt").write_bytes(b"<!DOCTYPE html><html>Sign in</html>")
    result = run("--ckpt", ckpt, "--prompt", "x", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["garbage.ckpt"]


def test_a_pickled_command_is_not_run(tmp_path):
    config = tiny_config()
    write_ckpt(tmp_path / "evil.ckpt", random_models(config, seed=0))
    import torch

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"state_dict": {"x": Payload()}}, tmp_path / "evil.ckpt")
    result = run("--ckpt", "evil.ckpt", "--prompt", "x", cwd=tmp_path)
    assert result.returncode == 2
    assert "system" in result.stderr
    assert not (tmp_path / "owned").exists()


def test_interrupt_leaves_no_file(ckpt, tmp_path):
    command = [sys.executable, str(PROGRAM), "--ckpt", str(ckpt), "--prompt", "x", "--steps", "1000"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while "denoise" not in (process.stderr.read(1) + process.stderr.readline(200)) and time.monotonic() < deadline:
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_torch():
    code = f"import sys; sys.argv = ['x', '--help']; sys.path.insert(0, {str(PROGRAM.parent.parent)!r})\n"
    code += "from sd.inference import main\ntry:\n    main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_samplers_of_the_command_line_are_those_there_are():
    from sd import samplers

    assert tuple(samplers.SAMPLERS) == SAMPLERS

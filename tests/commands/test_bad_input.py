"""Everything that a person can get wrong: one line, exit code 2, no traceback, nothing written, nothing executed."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.reference.weights import original_layout, tiny_config, write_ckpt
from sd import inference
from sd.inference import FIRST_SCREEN, main
from sd.pipeline import GET_WEIGHTS
from tests.weights import random_models

PROGRAM = Path(inference.__file__)


@pytest.fixture
def folder(tiny_checkpoint, tmp_path, monkeypatch) -> Path:
    """The working directory, with a model to use by default."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("SD_CKPT", str(tiny_checkpoint))
    return tmp_path / "here"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(folder, capfd):
    """Run the command line; returns its complaint: checked to be one line, with no file changed."""

    def call(*arguments: object) -> str:
        before = contents(folder)
        capfd.readouterr()
        code = main(list(map(str, arguments)))
        printed = capfd.readouterr()
        assert code == 2, printed
        assert contents(folder) == before
        assert printed.out == ""
        lines = printed.err.splitlines()
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("error: ")
        return lines[0]

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps must be from 1 to 1000, not 0"),
        (["--steps", "1001"], "steps must be from 1 to 1000, not 1001"),
        (["--cfg-scale", "nan"], "cfg_scale must be a finite number, not nan"),
        (["--cfg-scale=-inf"], "cfg_scale must be a finite number"),
        (["--cfg-scale", "1e40"], "cfg_scale must be from -1000 to 1000, not 1e\\+40"),
        (["--cfg-scale", "1" + "0" * 400], "cfg_scale must be a finite number, not inf"),
        (["--strength", "0"], "strength must be over 0 and at most 1, not 0.0"),
        (["--strength", "2"], "strength must be over 0 and at most 1, not 2.0"),
        (["--strength", "nan"], "strength must be a finite number"),
        (["--height", "100"], "nearest: height 64 or 128"),
        (["--width", "32"], "nearest: height 64, width 64"),
        (["--height", "0"], "height must be from 1"),
        (["--height", "-64"], "height must be from 1"),
        (["--seed", "-2"], "seed must be from 0 to 2**63 - 1, not -2"),
        (["--seed", str(2**63)], "seed must be from 0 to 2**63 - 1"),
        (["--seed", str(2**63 - 1), "--num-images", "2"], "seed must be from 0 to 2**63 - 1"),
        (["--num-images", "0"], "num_images must be from 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--sampler", "magic"], "no sampler 'magic'; there are ddpm, ddim, plms"),
        (["--schedule", "magic"], "no schedule 'magic'; there are leading, trailing"),
        (["--clip-skip", "0"], "clip_skip must be from 1 to 12, not 0"),
        (["--negative-prompt", "(x:99)"], "a weight in a prompt must be from -10 to 10, not 99"),
        (["--prompt-syntax", "a1111", "--negative-prompt", "(x"], "the bracket ( is not closed in the prompt '(x'"),
        (["--eta", "2"], "eta must be from 0 to 1, not 2.0"),
        (["--eta", "0.5"], "the sampler ddpm has no eta; it takes no such options"),
        (["--sampler", "lcm", "--steps", "51"], "the lcm schedule has at most 50 steps, not 51"),
        (["--sampler", "dpmpp_2m", "--solver-order", "4"], "solver_order of dpmpp_2m must be from 1 to 3, not 4"),
        (["--outpaint", "64,0,0,0"], "outpaint says how a picture grows: it needs init_image, that picture"),
        (["--outpaint", "64"], "outpaint must be pixels to the left, top, right and bottom, as 64,0,64,0, not '64'"),
        (["--hires", "1"], "hires must be over 1 and at most 4, not 1.0"),
        (["--hires", "2", "--hires-strength", "0"], "hires_strength must be over 0 and at most 1, not 0.0"),
        (["--mask", "m.png", "--mask-padding", "-1"], "mask_padding must be from 0 to 4096, not -1"),
        (["--preview", "0"], "--preview must be at least 1, not 0"),
        (["--lora-dir", "none"], "--lora-dir: there is no folder none"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--prompt", "\udcff"], "prompt holds characters that are not Unicode text"),
        (["--out", "/dev/null/x.png"], "/dev/null is no folder"),
        (["--out", "."], "is a folder"),
        (["--out", "x.gif"], "must end in one of .png, .jpg"),
        (["--out", "/dev/null"], "must end in one of .png, .jpg"),
        (["--out", "-", "--num-images", "2"], "standard output takes one picture"),
        (["--out", "{index.__class__}.png"], "has the field"),
        (["--out", "x" * 300 + ".png"], "longer than 255 bytes"),
        (["--device", "warp"], "--device: no device 'warp'; there are cuda"),
        (["--device", "cuda:99"], "--device: 'cuda:99' cannot be used here"),
        (["--opt", "magic"], "no optimization 'magic'"),
        (["--attention", "magic"], "magic"),
        (["--load-quantized", "missing.safetensors"], "missing.safetensors"),
        (["--save-quantized", "q.safetensors"], "not quantized"),
        (["--prompts-file", "also.txt"], "one of them"),
    ],
)
def test_values(refused, arguments, message):
    import re

    assert re.search(
        message.replace("*", r"\*").replace("(", r"\("), refused("--prompt", "x", "--steps", "2", *arguments)
    )


def test_nothing_to_draw(refused):
    assert "say what to draw" in refused("--steps", "3")


def test_without_a_word_there_is_a_screen_whose_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SD_CKPT", raising=False)
    monkeypatch.setattr("sys.argv", ["inference.py"])
    assert main() == main([]) == 2
    printed = capsys.readouterr().err
    assert max(map(len, printed.splitlines())) <= 100
    examples = [line.split(maxsplit=2)[2] for line in FIRST_SCREEN.splitlines() if line.startswith("  python sd/inf")]
    assert len(examples) == 3
    for example in examples:
        assert main([*shlex.split(example), "--steps", "1"]) == 0, capsys.readouterr().err
    assert len(list(tmp_path.glob("castle-*.png"))) == 4
    assert len(list(tmp_path.glob("output*.png"))) == 2


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["--sampler", "ddmi"], "ddim"),
        (["--sampler", "Euler-b"], "euler"),
        (["--schedule", "kars"], "karras"),
        (["--opt", "winogard"], "winograd"),
        (["--opt", "compile=block"], "blocks"),
        (["--attention", "flsh"], "flash"),
        (["--dtype", "float61"], "float16"),
        (["--device", "cuad"], "cuda"),
        (["--prompt-syntax", "A11"], "a1111"),
        (["--control-preprocess", "cany"], "canny"),
        (["--stpes", "3"], "--steps"),
        (["--negativ_prompt=x"], "--negative-prompt"),
        (["--out", "{sed}.png"], "seed"),
    ],
)
def test_a_name_that_is_none_is_told_what_is_near(refused, arguments, near):
    assert f"; is it '{near}'?" in refused("--prompt", "x", *arguments)


# ---- checkpoints

HTML = b"<!DOCTYPE html><html>Sign in</html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:6ce0161689b3\nsize 4265146304\n"


def weights(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**original_layout(random_models(tiny_config(), seed=0)), **changes}


def with_nan(path: Path) -> None:
    tensors = weights()
    tensors["model.diffusion_model.out.2.bias"] = torch.tensor([0.0, float("nan"), 0.0, 0.0])
    save_file(tensors, path)


def truncated(path: Path) -> None:
    save_file(weights(), path)
    os.truncate(path, path.stat().st_size // 2)


def truncated_ckpt(path: Path) -> None:
    write_ckpt(path, random_models(tiny_config(), seed=0))
    os.truncate(path, path.stat().st_size // 2)


def sdxl(path: Path) -> None:
    names = ("conditioner.embedders.1.model.ln_final.weight", "model.diffusion_model.label_emb.0.0.weight")
    save_file({name: torch.zeros(8, 8) for name in names}, path)


def sd2(path: Path) -> None:
    save_file(
        {"cond_stage_model.model.ln_final.weight": torch.zeros(8), "model.diffusion_model.x": torch.zeros(8)}, path
    )


CHECKPOINTS = {
    "page.safetensors": (lambda path: path.write_bytes(HTML), "web page"),
    "page.ckpt": (lambda path: path.write_bytes(HTML), "web page"),
    "pointer.safetensors": (lambda path: path.write_bytes(LFS), "git-lfs"),
    "random.safetensors": (lambda path: path.write_bytes(bytes(range(256)) * 99), ""),
    "random.ckpt": (lambda path: path.write_bytes(bytes(range(256)) * 99), ""),
    "empty.ckpt": (lambda path: path.touch(), ""),
    "folder.ckpt": (lambda path: path.mkdir(), "folder"),
    "missing.ckpt": (lambda path: None, "there is no file"),
    "truncated.safetensors": (truncated, ""),
    "truncated.ckpt": (truncated_ckpt, ""),
    "nan.safetensors": (with_nan, "NaN"),
    "sdxl.safetensors": (sdxl, "Stable Diffusion XL"),
    "sd2.safetensors": (sd2, "lacks"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(refused, folder, name):
    make, message = CHECKPOINTS[name]
    make(folder / name)
    line = refused("--prompt", "x", "--steps", 1, "--ckpt", name)
    assert name in line
    assert message in line


def test_a_pickled_command_is_not_run(refused, folder):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {folder}/owned",)

    torch.save({"state_dict": {"x": Payload()}}, "evil.ckpt")
    assert "system" in refused("--prompt", "x", "--ckpt", "evil.ckpt")
    assert not Path("owned").exists()


def test_no_weights_at_all(refused, folder, monkeypatch):
    monkeypatch.delenv("SD_CKPT")
    monkeypatch.setattr("sd.pipeline.DATA", folder)
    monkeypatch.setattr("sd.pipeline.DEMO_CHECKPOINT", folder / "demo")
    assert "python sd/download.py" in GET_WEIGHTS
    assert GET_WEIGHTS in refused("--prompt", "x")


# ---- files read


def test_init_images(refused):
    Path("text.png").write_text("not a picture")
    Path("evil.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    Image.effect_noise((64, 64), 50).save("whole.png")
    Path("truncated.png").write_bytes(Path("whole.png").read_bytes()[:-2000])
    for name in ("text.png", "evil.eps", "missing.png", "."):
        assert f"--init-image: {name} cannot be read" in refused("--prompt", "x", "--init-image", name)
    Path("p.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "init_image": "missing.png"}\n')
    assert "p.jsonl line 2: missing.png cannot be read" in refused("--prompts-file", "p.jsonl")


def test_a_truncated_init_image(folder, capfd):
    Image.effect_noise((64, 64), 50).save("whole.png")
    Path("truncated.png").write_bytes(Path("whole.png").read_bytes()[:-2000])
    assert main(["--prompt", "x", "--steps", "1", "--init-image", "truncated.png", "--out", "a.png"]) == 2
    assert "truncated.png cannot be read" in capfd.readouterr().err.splitlines()[-1]
    assert not Path("a.png").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", None, "cannot be read (No such file or directory)"),
        ("p.txt", b"a caf\xe9", "is not UTF-8 text"),
        ("p.txt", b"\xff\xfea\0", "is not UTF-8 text"),
        ("p.txt", b"\n\n", "holds no prompt"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"', "p.jsonl line 2: not JSON"),
        ("p.jsonl", b'{"prompt": "a", "steps": 0}', "p.jsonl line 1: steps must be from 1 to 1000"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "a", "width": 100}', "p.jsonl line 2: 64x100"),
    ],
)
def test_prompts_files(refused, name, content, message):
    if content is not None:
        Path(name).write_bytes(content)
    assert message in refused("--prompts-file", name)


def test_a_folder_as_prompts_file(refused):
    assert "cannot be read (Is a directory)" in refused("--prompts-file", ".")


def test_pictures_to_draw_again(refused, tiny_checkpoint):
    from sd.pictures.png import save_png

    Image.new("RGB", (8, 8)).save("foreign.png")
    Path("text.png").write_text("not a picture")
    assert "holds no parameters" in refused("--from-png", "foreign.png")
    assert "cannot identify" in refused("--from-png", "text.png")
    assert "--from-png: there is no file missing.png" in refused("--from-png", "missing.png")
    cases = [
        ({"prompt": "x", "steps": 0}, "steps must be"),
        ({"prompt": ["x"]}, "prompt must be text"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": "x", "cfg_scale": 1e40}, "cfg_scale must be from -1000 to 1000"),
        ({"prompt": "x", "dtype": "int8"}, "no dtype 'int8'"),
        ({"prompt": "x", "device": "warp"}, "--device: no device 'warp'"),
        ({"prompt": "x", "opt": "magic"}, "no optimization 'magic'"),
        ({"prompt": "x", "init_image": "gone.png", "init_image_hash": "0"}, "--init-image"),
        ({"prompt": "x", "checkpoint": "/etc/passwd", "checkpoint_hash": "0"}, "--ckpt"),
        ({"prompt": "x", "quantized": "q.safetensors"}, "--load-quantized"),
    ]
    for parameters, message in cases:
        save_png(Image.new("RGB", (8, 8)), "recorded.png", parameters)
        assert message in refused("--from-png", "recorded.png")


# ---- files written


def test_a_picture_of_another_run_stays(refused, folder):
    assert main(["--prompt", "x", "--steps", "1", "--out", "output-1.png"]) == 0
    line = refused("--prompt", "y", "--num-images", 2, "--steps", 1, "--out", "output.png")
    assert "output-1.png is there and is another picture (its prompt is 'x', not 'y'); --overwrite" in line


def test_a_read_only_disk(refused, read_only_disk):
    line = refused("--prompt", "x", "--steps", 1, "--out", read_only_disk / "a.png")
    assert "read-only is not writable (Read-only file system)" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(refused, folder):
    Path("locked").mkdir(mode=0o500)
    assert "locked is not writable" in refused("--prompt", "x", "--steps", 1, "--out", "locked/a.png")


def test_a_disk_that_is_full(refused, small_disk):
    (small_disk / "filler").write_bytes(bytes(2**16))
    line = refused("--prompt", "x", "--steps", 1, "--out", small_disk / "a.png")
    assert "not writable (No space left on device)" in line
    assert os.listdir(small_disk) == ["filler"]


def test_a_disk_that_fills_up(folder, small_disk, capfd):
    """The pictures that fit are whole, no other file is left, and the message is one line."""
    assert main(["--prompt", "x", "--steps", "1", "--num-images", "9", "--out", f"{small_disk}/a.png"]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "No space left on device" in last
    assert 0 < len(os.listdir(small_disk)) < 9
    for path in small_disk.iterdir():
        with Image.open(path) as image:
            image.load()


# ---- in a process of its own: no traceback from the interpreter's end either


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps must be from 1 to 1000"),
        (["--ckpt", "missing.safetensors"], "missing.safetensors"),
        (["--out", "/dev/null/x.png"], "/dev/null is no folder"),
    ],
)
def test_as_a_process(folder, arguments, message):
    command = [sys.executable, str(PROGRAM), "--prompt", "x", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(folder.iterdir()) == []

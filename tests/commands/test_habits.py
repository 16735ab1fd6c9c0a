"""What people type who come from other programs, and what they have lying about."""

import io
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, PngImagePlugin

from sd import convert
from sd.inference import main
from sd.pictures.parameters import UserError
from sd.pictures.png import read_parameters
from sd.pictures.prompts_file import read_prompts
from sd.pipeline import StableDiffusion

DRAW = ["--steps", "1", "--seed", "3", "--sampler", "ddim"]


@pytest.fixture
def typed(shallow_checkpoint, tmp_path, monkeypatch, capfd):
    """typed("--prompt", ...) -> exit code, stdout and stderr, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD_CKPT", str(shallow_checkpoint))

    def typed(*words: object) -> SimpleNamespace:
        code = main([*map(str, words)])
        return SimpleNamespace(code=code, **capfd.readouterr()._asdict())

    return typed


# ---- files that are there


def test_a_file_of_somebody_elses_is_not_written_over(typed, tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photo.png")
    before = (tmp_path / "photo.png").read_bytes()
    draw = ["--prompt", "a cat", *DRAW, "--out", "photo.png"]
    refused = typed(*draw)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == "error: photo.png is there, and no picture of this program; --overwrite, or another --out\n"
    assert (tmp_path / "photo.png").read_bytes() == before
    assert typed(*draw, "--overwrite").code == 0
    assert read_parameters(tmp_path / "photo.png")["prompt"] == "a cat"
    assert typed("--prompt", "a dog", *DRAW, "--out", "photo.png").code == 0
    assert read_parameters(tmp_path / "photo.png")["prompt"] == "a dog"


def test_one_prompt_of_a_file_goes_to_standard_output(typed, tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text("a cat\n")
    (tmp_path / "two.txt").write_text("a cat\na dog\n")
    out = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", out)
    assert typed("--prompts-file", "one.txt", *DRAW, "--out", "-").code == 0
    assert Image.open(io.BytesIO(out.buffer.getvalue())).format == "PNG"
    assert "takes one picture" in typed("--prompts-file", "two.txt", *DRAW, "--out", "-").err


# ---- tables


def table(folder, text: str):
    (folder / "p.csv").write_text(text, newline="")
    return read_prompts(folder / "p.csv")


def test_a_table_has_a_picture_a_row(tmp_path):
    rows = (
        "prompt,seed,steps,cfg_scale,init_image,mask_invert",
        '"a fox, sitting",1,20.0,,,',
        "a cat,2,,7.5,a.png,TRUE",
    )
    first, second = table(tmp_path, "\r\n".join(rows))
    assert first == (f"{tmp_path}/p.csv line 2", {"prompt": "a fox, sitting", "seed": 1, "steps": 20})
    given = {"prompt": "a cat", "seed": 2, "cfg_scale": 7.5, "init_image": f"{tmp_path}/a.png", "mask_invert": True}
    assert second == (f"{tmp_path}/p.csv line 3", given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,steps\nx,2.5\n", "line 2: steps must be a whole number, not 2.5"),
        ("prompt,steps\nx,many\n", "line 2: steps must be a whole number, not 'many'"),
        ("prompt,steps\nx," + "9" * 400 + "\n", "line 2: steps must be"),
        ("prompt,cfg_scale\nx,1e999\n", "line 2: cfg_scale must be a finite number"),
        ("prompt,cfg_scale\nx,1.2.3\n", "line 2: cfg_scale must be a finite number, not '1.2.3'"),
        ("prompt,stepz\nx,1\n", "line 2: there is no parameter 'stepz'; is it 'steps'?"),
        ("text,steps\nx,1\n", 'line 2: it lacks "prompt"'),
        ("prompt\nx,1\n", "line 2: more cells than the first row has names"),
        ('prompt\n"x\n', "no table"),
        ("prompt,seed\n", "holds no prompt"),
        ("", "holds no prompt"),
    ],
)
def test_tables_that_are_none(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        table(tmp_path, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# ---- other programs


@pytest.mark.parametrize(
    "text", ["((red)) cat", "[[blurry]]", "a [red:blue:0.3] cat", "a [red|blue] cat", "<lora:x:0.8> cat"]
)
def test_another_syntax_is_told(typed, caplog, text):
    assert typed("--prompt", text, *DRAW, "--prompt-syntax", "plain").code == 0
    assert "a1111" not in caplog.text
    assert typed("--prompt", text, *DRAW).code == 0
    assert "is read as text; --prompt-syntax a1111 reads it as AUTOMATIC1111's web UI does" in caplog.text


@pytest.mark.parametrize("text", ["a (red:1.2) cat", "a cat (sitting)", "a [sic] cat", "8 | 9", "a: b"])
def test_signs_that_mean_nothing_are_not_told(typed, caplog, text):
    assert typed("--prompt", text, *DRAW).code == 0
    assert "a1111" not in caplog.text


def with_text(path, **chunks: str):
    info = PngImagePlugin.PngInfo()
    for key, value in chunks.items():
        info.add_text(key, value)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def test_a_sampler_that_is_named_stands_for_one_that_is_not_here(typed, tmp_path):
    with_text(
        tmp_path / "theirs.png", parameters="a cat\nSteps: 1, Sampler: Restart, CFG scale: 7.0, Seed: 3, Size: 64x64"
    )
    assert "no sampler 'Restart'" in typed("--from-png", "theirs.png").err
    drawn = typed("--from-png", "theirs.png", "--sampler", "ddim", "--out", "ours.png")
    assert drawn.code == 0, drawn.err
    assert read_parameters(tmp_path / "ours.png")["sampler"] == "ddim"


def test_a_workflow_is_called_by_its_name(typed, tmp_path):
    with_text(tmp_path / "comfy.png", prompt='{"3": {"class_type": "KSampler"}}', workflow="{}")
    assert "it is ComfyUI's, whose workflows are not read (comfy.png)" in typed("--from-png", "comfy.png").err


def test_a_prompt_without_its_option(typed):
    assert "; a prompt is --prompt TEXT, in quotes" in typed("a cat").err
    assert "is it '--steps'?" in typed("--prompt", "x", "--stepz", "3").err


# ---- types


def test_types_by_the_names_that_everybody_says(typed, caplog, tmp_path, shallow_checkpoint):
    assert StableDiffusion.load(shallow_checkpoint, "cpu", "fp16").dtype == torch.float16
    assert StableDiffusion.load(shallow_checkpoint, "cpu", "bfloat16").dtype == torch.bfloat16
    for wrong in ("int8", "fp12", "nn", torch.int8, 16):
        with pytest.raises(ValueError, match=r"dtype must be torch\.float32"):
            StableDiffusion.load(shallow_checkpoint, "cpu", wrong)
    slow = typed("--prompt", "a cat", *DRAW, "--dtype", "fp16", "--out", "a.png")
    assert slow.code == 0
    assert "float16 is many times slower than float32 on a CPU" in caplog.text
    assert read_parameters(tmp_path / "a.png")["dtype"] == "float16"
    assert convert.main([str(shallow_checkpoint), str(tmp_path / "half.safetensors"), "--dtype", "fp16"]) == 0


def test_a_checkpoint_that_is_not_there_is_told_at_once(typed):
    assert (
        typed("--prompt", "x", "--ckpt", "gone.safetensors").err == "error: --ckpt: there is no file gone.safetensors\n"
    )


def test_the_converter_is_a_program_too(tmp_path):
    words = [sys.executable, convert.__file__, "--help"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "diffusers" in result.stdout

"""LoRAs that prompts name: merged for their pictures alone, recorded, found again, refused where none can be had."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.reference.numbers import noise
from sd import inference, prompts
from sd.pictures.loras import named
from sd.pictures.plan import plan
from sd.pictures.png import read_parameters
from sd.pictures.prompts_file import Entry
from sd.service.orders import Limits, read_order
from sd.service.worker import FailedError
from tests.weights import shallow_pipeline

LINE = ("--steps", "2", "--seed", "1", "--prompt-syntax", "a1111", "--lora-dir", "loras")


@pytest.fixture
def folder(shallow_checkpoint, tmp_path, monkeypatch) -> Path:
    """With two LoRAs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD_CKPT", str(shallow_checkpoint))
    Path("loras").mkdir()
    write("loras/style.safetensors", 1)
    write("loras/my toy.safetensors", 2)
    return tmp_path


def write(file: str, seed: int) -> None:
    unet, tensors = shallow_pipeline().unet, {}
    for i, (name, module) in enumerate(unet.named_modules()):
        if name.endswith("to_v"):
            rows, columns = module.weight.shape
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = noise(2, columns, seed=seed + i)
            tensors[f"{key}.lora_up.weight"] = noise(rows, 2, seed=seed + i + 1)
    save_file(tensors, file)


def draw(*arguments: str) -> int:
    return inference.main([*arguments, *LINE])


def pixels(file: str) -> np.ndarray:
    return np.asarray(Image.open(file), dtype=float)


def test_a_tag_is_the_option(folder):
    assert draw("--prompt", "a fox<lora:style:0.7>", "--out", "tag.png") == 0
    assert draw("--prompt", "a fox", "--lora", "loras/style.safetensors:0.7", "--out", "option.png") == 0
    assert draw("--prompt", "a fox", "--out", "plain.png") == 0
    assert np.array_equal(pixels("tag.png"), pixels("option.png"))
    assert np.abs(pixels("tag.png") - pixels("plain.png")).max() > 8


def test_each_picture_has_its_own(folder):
    texts = ["a", "b <lora:style>", "c <lora:my toy:0.5> <lora:style:0.2>", "d <lora:style:0.9>", "e"]
    Path("p.jsonl").write_text("\n".join(json.dumps({"prompt": text, "seed": 1}) for text in texts))
    assert inference.main(["--prompts-file", "p.jsonl", "--out", "all-{index}.png", "--batch-size", "5", *LINE]) == 0
    for i, text in enumerate(texts, start=1):
        assert draw("--prompt", text, "--out", "alone.png") == 0
        assert np.abs(pixels(f"all-{i}.png") - pixels("alone.png")).max() <= 1
    said = read_parameters("all-3.png")
    assert said["prompt"] == texts[2]
    assert [name for name, _ in said["prompt_loras"]] == ["my toy", "style"]
    assert "prompt_loras" not in read_parameters("all-5.png")


def test_a_picture_again(folder, capsys):
    assert draw("--prompt", "a <lora:style:0.5>", "--out", "a.png") == 0
    assert inference.main(["--from-png", "a.png", "--lora-dir", "loras", "--out", "b.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert inference.main(["--from-png", "a.png", "--out", "b.png"]) == 2
    assert "the prompt names the LoRA style: --lora-dir says in which folder it is" in capsys.readouterr().err
    assert inference.main(["--from-png", "a.png", "--prompt", "b", "--out", "b.png"]) == 0
    write("loras/style.safetensors", 9)
    assert inference.main(["--from-png", "a.png", "--lora-dir", "loras", "--out", "b.png"]) == 2
    assert "was drawn with another LoRA style" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<lora:none:1>", "there is no LoRA none in loras; there are my toy, style"),
        ("<lora:../style:1>", "'../style' is no name of a LoRA"),
        ("<lora:style:much>", "must be a number, not 'much'"),
        ("<lora:style:1000>", "must be from -10 to 10, not 1000"),
    ],
)
def test_mistakes_are_one_line_before_loading(folder, capsys, monkeypatch, prompt, message):
    monkeypatch.setattr("sd.pipeline.StableDiffusion.load", None)
    assert draw("--prompt", prompt) == 2
    assert message in capsys.readouterr().err


def test_other_syntaxes_know_no_tags(folder):
    assert prompts.loras("<lora:style:1>", "weights") == prompts.loras("<lora:style:1>", None) == []
    (job,) = plan([Entry("", {"prompt": "a <lora:x:0.5> <lora:x:2> <lora:y>", "prompt_syntax": "a1111"})], {}, 0)
    assert named(job) == (("x", 2.0), ("y", 1.0))
    assert prompts.parse("a <lora:x:0.5>(b)", "a1111") == [("a ", 1.0), ("b", 1.1)]


def test_python_and_the_service_refuse_what_is_not_merged():
    pipe = shallow_pipeline()
    with pytest.raises(ValueError, match="names the LoRA style, which is not merged: add_lora first"):
        pipe.generate("a <lora:style:1>", steps=1, height=16, width=16, prompt_syntax="a1111")
    body = json.dumps({"prompt": "a <lora:style:1>", "prompt_syntax": "a1111"}).encode()
    with torch.no_grad(), pytest.raises(FailedError, match="the LoRA style, which cannot be had here"):
        read_order(body, Limits(), pipe.config)

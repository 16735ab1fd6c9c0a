"""What a terminal would obey reaches none: in names, in what pictures say, in a server's words."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sd import download
from sd.pictures.png import save_png
from sd.printable import Printable, printable

ROOT = Path(__file__).resolve().parents[1]
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m"


def test_texts():
    assert printable(f"a{EVIL}ü狐\n\r\tb") == "a ]0;owned  [2J 31mü狐\n  b"
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s: line", (EVIL,), None)
    assert Printable("%(message)s").format(record) == f"{printable(EVIL)}: line"


@pytest.mark.parametrize("kind", ["a name", "a field", "an error", "a foreign field", "a LoRA's trigger"])
def test_the_command(tmp_path, tiny_checkpoint, kind):
    evil = tmp_path / f"p{EVIL}.png"
    line = ["--prompt", "x", "--steps", "1", "--ckpt", str(tiny_checkpoint), "--opt", "none"]
    if kind == "a name":
        line += ["--out", str(evil)]
    elif kind == "a field":
        save_png(Image.new("RGB", (8, 8)), evil, {"prompt": "x", "sampler": "ddim", "device": EVIL})
        line = ["--from-png", str(evil), "--ckpt", str(tiny_checkpoint)]
    elif kind == "an error":
        line += ["--init-image", str(evil)]
    elif kind == "a LoRA's trigger":
        line += ["--lora", lora(tmp_path, tiny_checkpoint)]
    else:
        from PIL import PngImagePlugin

        text = PngImagePlugin.PngInfo()
        text.add_text("parameters", f"x\nSteps: 1, Sampler: Euler, Size: 64x64, Odd: {EVIL}")
        Image.new("RGB", (8, 8)).save(evil, pnginfo=text)
        line = [
            "--from-png",
            str(evil),
            "--ckpt",
            str(tiny_checkpoint),
            "--opt",
            "none",
            "--out",
            str(tmp_path / "o.png"),
        ]
    command = [sys.executable, str(ROOT / "sd" / "inference.py"), *line]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode in (0, 2), done.stderr
    assert "owned" in done.stdout + done.stderr
    assert not {"\x1b", "\x07", "\x9b"} & {*done.stdout, *done.stderr}


def lora(folder: Path, checkpoint: Path) -> str:
    import json

    import torch
    from safetensors.torch import load_file, save_file

    name = next(name for name in load_file(checkpoint) if name.endswith("attn2.to_q.weight"))
    rows, columns = load_file(checkpoint)[name].shape
    key = "lora_unet_" + name.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
    tensors = {f"{key}.lora_down.weight": torch.ones(1, columns), f"{key}.lora_up.weight": torch.ones(rows, 1)}
    said = {"ss_tag_frequency": json.dumps({"1_x": {EVIL: 9}})}
    save_file(tensors, folder / "l.safetensors", metadata=said)
    return str(folder / "l.safetensors")


def test_a_servers_words(monkeypatch, capsys):
    def fail(source, path):
        raise download.DownloadError(f"https://example.org: 404 {EVIL}")

    monkeypatch.setattr(download, "download", fail)
    assert download.main([]) == 2
    assert not {"\x1b", "\x07", "\x9b"} & {*capsys.readouterr().err}

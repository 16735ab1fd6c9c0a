"""--control from the option to the file and back, and hints made of pictures."""

import builtins
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from bench.reference.numbers import pixels
from bench.reference.weights import random_controlnet
from sd import hints, inference
from sd.config import SD15
from sd.pictures.controls import Named, read_control
from sd.pictures.png import read_parameters
from sd.service.orders import Limits, read_order
from sd.service.worker import FailedError
from tests.weights import SHALLOW

DRAW = ["--prompt", "a fox", "--steps", "2", "--seed", "3", "--sampler", "ddim", "--opt", "none", "--device", "cpu"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("n.pth:a.png", ("n.pth", "a.png")),
        ("n.pth:a.png:0.5", ("n.pth", "a.png", 0.5)),
        ("n.pth:a.png:-1:0-0.5", ("n.pth", "a.png", -1.0, 0.0, 0.5)),
        ("n.pth:a.png:1:.25-1", ("n.pth", "a.png", 1.0, 0.25, 1.0)),
        ("n.pth:0.5", ("n.pth", "0.5")),
        ("n.pth:a.png:x", ("n.pth", "a.png:x")),
        ("a/n.pth:b:c.png", ("a/n.pth", "b:c.png")),
    ],
)
def test_what_one_says(text, named):
    net, picture, *numbers = named
    assert read_control(text) == Named(Path(net), Path(picture), *numbers)
    assert read_control(read_control(text).text()) == read_control(text)


def test_where_names_have_colons_the_files_decide(tmp_path):
    for name in ("a:n.pth", "b:c.png"):
        (tmp_path / name).touch()
    named = read_control(f"{tmp_path}/a:n.pth:{tmp_path}/b:c.png:0.5")
    assert (named.net.name, named.picture.name, named.weight) == ("a:n.pth", "b:c.png", 0.5)


@pytest.mark.parametrize("text", ["n.pth", "", ":", "n:a:1:1-0", "n:a:1:0-2", "n:a:99999"])
def test_what_says_nothing_is_refused(text):
    with pytest.raises(ValueError, match="control"):
        read_control(text)


# ---- the command line


@pytest.fixture
def here(tmp_path, monkeypatch, shallow_checkpoint):
    """A working directory with a ControlNet and a picture for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD_CKPT", str(shallow_checkpoint))
    save_file(random_controlnet(SHALLOW).state_dict(), "net.safetensors")
    image = Image.new("RGB", (40, 40))
    ImageDraw.Draw(image).rectangle((10, 10, 30, 30), fill="white")
    image.save("square.png")
    return tmp_path


def test_a_picture_says_its_controls_and_is_drawn_again(here, capsys):
    controls = ["--control", "net.safetensors:square.png:0.5", "--control", "net.safetensors:square.png:1:0-0.5"]
    assert inference.main([*DRAW, "--out", "plain.png"]) == 0
    assert inference.main([*DRAW, *controls, "--control-preprocess", "invert", "--out", "a.png"]) == 0
    assert not np.array_equal(pixels("a.png"), pixels("plain.png"))
    said = read_parameters("a.png")
    assert said["control"] == ["net.safetensors:square.png:0.5", "net.safetensors:square.png:1:0-0.5"]
    assert said["control_preprocess"] == ["invert"]
    assert np.shape(said["control_hash"]) == (2, 2)
    (here / "moved").mkdir()
    for name in ("a.png", "net.safetensors", "square.png"):
        Path(name).rename(f"moved/{name}")  # beside the picture
    assert inference.main(["--from-png", "moved/a.png", "--out", "b.png"]) == 0
    assert np.array_equal(pixels("moved/a.png"), pixels("b.png"))
    Image.new("RGB", (40, 40)).save("moved/square.png")
    assert inference.main(["--from-png", "moved/a.png", "--out", "c.png"]) == 2
    assert "drawn from square.png" in capsys.readouterr().err


def test_pictures_that_are_there_are_known_by_their_controls(here, capsys):
    run = [*DRAW, "--num-images", "2", "--out", "{index}.png", "--control"]
    assert inference.main([*run, "net.safetensors:square.png"]) == 0
    assert inference.main([*run, "net.safetensors:square.png"]) == 0
    assert "all 2 pictures are there already" in capsys.readouterr().out
    assert inference.main([*run, "net.safetensors:square.png:0.5"]) == 2
    assert "its control is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--control", "net.safetensors"], "--control: control must be FILE:PICTURE"),
        (["--control", "gone.pth:square.png"], "--control: there is no file gone.pth"),
        (["--control", "net.safetensors:gone.png"], "gone.png cannot be read as a picture"),
        (["--control", "net.safetensors:net.safetensors"], "cannot be read as a picture"),
        (["--control", "net.safetensors:square.png:1:0.5-0.5"], "between two fractions of the steps"),
        (["--control", "net.safetensors:square.png", "--control-preprocess", "x"], "no control_preprocess 'x'"),
        (["--control-preprocess", "none", "--control-preprocess", "none"], "2 control_preprocess for 1 controls"),
    ],
)
def test_mistakes_are_one_line_before_the_model_is_loaded(here, capsys, monkeypatch, arguments, words):
    monkeypatch.setenv("SD_CKPT", "gone.safetensors")
    assert inference.main([*DRAW, *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_damaged_controlnet_is_one_line_and_no_picture(here, capfd):
    Path("bad.pth").write_bytes(b"bad")
    assert inference.main([*DRAW, "--control", "bad.pth:square.png"]) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not Path("output.png").exists()


@pytest.mark.parametrize("values", ['"control": "n.pth:a.png"', '"control": ["n.pth:a.png"]'])
def test_a_client_cannot_name_files_of_the_server(values):
    with pytest.raises(FailedError, match="control names files of this machine") as refused:
        read_order(f'{{"prompt": "x", {values}}}'.encode(), Limits(), SD15)
    assert refused.value.status == 422


# ---- hints


def test_edges_lie_where_the_picture_changes():
    pytest.importorskip("cv2")
    image = Image.new("RGB", (64, 64))
    ImageDraw.Draw(image).rectangle((16, 16, 47, 47), fill="white")
    edges = pixels(hints.preprocessed(image, "canny"))
    assert set(np.unique(edges)) == {0, 255}
    rows, columns, _ = np.nonzero(edges)
    border = np.minimum.reduce([abs(rows - 15.5), abs(rows - 47.5), abs(columns - 15.5), abs(columns - 47.5)])
    assert len(rows) > 3 * 4 * 28
    assert border.max() <= 1


def test_black_on_white_becomes_white_on_black():
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    assert np.array_equal(pixels(hints.preprocessed(image, "invert")), 255 - pixels(image))
    assert hints.preprocessed(image, "none") is image


def test_without_opencv_the_line_that_installs_it_is_told(here, capsys, monkeypatch):
    real = builtins.__import__
    missing = lambda name, *rest: real("no_such_module" if name == "cv2" else name, *rest)  # noqa: E731
    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setenv("SD_CKPT", "gone.safetensors")
    asked = ["--control", "net.safetensors:square.png", "--control-preprocess", "canny"]
    assert inference.main([*DRAW, *asked]) == 2
    assert "pip install opencv-python-headless" in capsys.readouterr().err

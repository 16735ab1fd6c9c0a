"""PNGs that say how they were drawn: whole or not there."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from sd.pictures.png import read_parameters, save_png


def test_parameters_survive_the_file(tmp_path):
    parameters = {"prompt": 'ein Füchslein 🦊\n"x"', "steps": 50, "cfg_scale": 7.5}
    save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", parameters)
    assert read_parameters(tmp_path / "a.png") == parameters


def test_a_picture_of_somebody_else_has_none(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="no parameters"):
        read_parameters(tmp_path / "b.png")


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(AttributeError):
        save_png(None, tmp_path / "c.png", {})
    assert list(tmp_path.iterdir()) == []


def test_a_whole_file_stays_when_its_replacement_fails(tmp_path):
    save_png(Image.new("RGB", (2, 2), "red"), tmp_path / "d.png", {"prompt": ""})
    with pytest.raises(AttributeError):
        save_png(None, tmp_path / "d.png", {})
    assert Image.open(tmp_path / "d.png").getpixel((0, 0)) == (255, 0, 0)


# ---- whole files or none

ENDLESS = """
import numpy, sys
from PIL import Image
from sd.pictures.png import save_png
rng = numpy.random.default_rng(0)
i = 0
while True:
    image = Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=numpy.uint8))
    save_png(image, f"{sys.argv[1]}/{i % 7}.png", {"prompt": "x", "i": i})
    i += 1
"""


def test_killed_at_any_moment_each_picture_is_whole(tmp_path):
    rng = random.Random(0)
    root = Path(__file__).resolve().parent.parent.parent
    whole = 0
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], cwd=root)
        before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.png")}
        while {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.png")} == before:
            assert process.poll() is None
        time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in tmp_path.glob("*.png"):
            with Image.open(path) as image:
                image.load()
            assert read_parameters(path)["prompt"] == "x"
            whole += 1
    assert whole > 5
    assert all(path.suffix == ".png" or path.name.endswith(".part") for path in tmp_path.iterdir())

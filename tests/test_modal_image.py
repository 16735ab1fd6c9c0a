"""What the image installs can be installed: Python 3.11 on Linux, from the index that pip is set up for."""

import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import requires
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from packaging.requirements import Requirement

import modal_inference

ROOT = Path(modal_inference.__file__).parent


@pytest.mark.full(memory=False)
def test_the_requirements_resolve_for_the_image(tmp_path):
    """`pip install --dry-run`, with wheels only: the image's base has a C compiler, but nothing should need one."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 27, 28, 34)]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-cache-dir", "--quiet"]
    command += ["--python-version=3.11", "--implementation=cp", "--only-binary=:all:", "--target", str(tmp_path / "x")]
    command += [*platforms, "--platform=manylinux2014_x86_64", "--platform=linux_x86_64", "--platform=any"]
    command += [
        "--disable-pip-version-check",
        modal_inference.TRITON,
        modal_inference.OPENCV,
        "-r",
        str(ROOT / "requirements.txt"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr


def test_opencv_is_the_one_that_the_tests_run_with():
    assert modal_inference.OPENCV in (ROOT / "requirements-dev.txt").read_text().splitlines()


def test_triton_is_the_one_that_the_tests_run_with():
    """And torch's own, where the installed torch asks for one: that of an index for CPUs does not."""
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    assert modal_inference.TRITON in [line.partition(";")[0] for line in lines]
    asked = [Requirement(text) for text in requires("torch")]
    version = modal_inference.TRITON.partition("==")[2]
    assert all(one.specifier.contains(version) for one in asked if one.name == "triton")


@pytest.mark.parametrize(
    ("asks", "built"), [(f"{modal_inference.TRITON}; sys_platform", True), ("triton==3.8.0; x", False), ("", False)]
)
def test_the_image_is_not_built_with_another_triton(monkeypatch, asks, built):
    monkeypatch.setattr("importlib.metadata.requires", lambda package: [asks])
    monkeypatch.setitem(sys.modules, "triton", MagicMock())
    monkeypatch.setitem(sys.modules, "triton.language", MagicMock())
    with nullcontext() if built else pytest.raises(AssertionError):
        exec(modal_inference.CHECK_TRITON, {})

"""What the image installs can be installed: Python 3.11 on Linux, from the index that pip is set up for."""

import subprocess
import sys
from pathlib import Path

import pytest

import modal_inference

ROOT = Path(modal_inference.__file__).parent


@pytest.mark.full(memory=False)
def test_the_requirements_resolve_for_the_image(tmp_path):
    """`pip install --dry-run`, with wheels only: the image's base has a C compiler, but nothing should need one."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 27, 28, 34)]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-cache-dir", "--quiet"]
    command += ["--python-version=3.11", "--implementation=cp", "--only-binary=:all:", "--target", str(tmp_path / "x")]
    command += [*platforms, "--platform=manylinux2014_x86_64", "--platform=linux_x86_64", "--platform=any"]
    command += ["--disable-pip-version-check", "-r", str(ROOT / "requirements.txt")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr

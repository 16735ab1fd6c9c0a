"""What the tests of modal_*.py share: the files that a person has, a checkpoint, a control plane with its client."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.modal_loopback import ControlPlane, Loopback

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = "v1-5-pruned-emaonly.safetensors"


def drawn_here(file: Path, checkpoint: Path, *arguments: object) -> None:
    """Draw the picture through sd/inference.py in this process, on one thread, as the containers here do.

    Sums are rounded in another order on several threads, whatever OMP_NUM_THREADS said when torch was imported.
    """
    import torch

    from sd.inference import main

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*map(str, arguments), "--ckpt", str(checkpoint), "--out", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The demo model under the name of SD 1.5's file: it draws in a second."""
    from sd.pipeline import DEMO_CHECKPOINT, StableDiffusion

    path = tmp_path_factory.mktemp("checkpoint") / CHECKPOINT
    StableDiffusion.load(DEMO_CHECKPOINT, "cpu").save(path)
    return path


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """A copy of this one, with what people leave lying about: a checkpoint in data/, another one in sd/."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("modal_inference.py", "modal_volume.py", "modal_infer.sh", "requirements.txt"):
        shutil.copy2(ROOT / name, folder)
    for name in ("sd", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.ckpt", "v1-5*"))
    for stray in (folder / "data" / CHECKPOINT, folder / "sd" / "mine.ckpt"):
        with stray.open("wb") as file:
            file.truncate(2**30)  # sparse: no byte of it is on the disk, and hashing it would take long
    return folder


@pytest.fixture(scope="session")
def uploads() -> dict[str, bytes]:
    """What one run uploaded the next one need not, as it is with Modal."""
    return {}


@pytest.fixture
def loopback(tmp_path, repository, uploads) -> Iterator[Loopback]:
    """A control plane with nothing in it, and `modal` in an empty folder."""
    here = tmp_path / "here"
    here.mkdir()
    secrets = {"sd-auth": {"SD_USER": "ada", "SD_PASSWORD": "enigma"}}
    with ControlPlane(tmp_path / "plane", secrets=secrets, uploads=uploads) as plane:
        yield Loopback(plane, repository, here)
        assert not plane.unknown, f"the client called what the loopback does not know: {plane.unknown}"


@pytest.fixture
def filled(loopback, checkpoint) -> Loopback:
    """The same, with the checkpoint in the volume."""
    os.link(checkpoint, loopback.plane.volume("sd-weights") / CHECKPOINT)
    return loopback

"""Full-size tests are skipped, with the reason, where the machine is too small for them."""

import functools
import gc
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("same", derandomize=True, database=None)
settings.register_profile("fuzz", derandomize=False, print_blob=True)
settings.load_profile("same")  # pytest --hypothesis-profile fuzz: others each time

FULL_SIZE_MEMORY = 16 * 2**30


def memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


gc.disable()  # until all is imported


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported stays: no collection need look at a million objects of other people's modules."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if memory() >= FULL_SIZE_MEMORY:
        return
    reason = f"full size needs {FULL_SIZE_MEMORY >> 30} GiB of memory; here are {memory() / 2**30:.1f}"
    for item in items:
        marker = item.get_closest_marker("full")
        if marker and marker.kwargs.get("memory", True):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _token_files_are_read_once() -> Iterator[None]:
    """Those of the repository, by whoever makes a Tokenizer in this process."""
    from sd import tokenizer

    read, own = tokenizer.read_bpe, (tokenizer.DATA / "vocab.json", tokenizer.DATA / "merges.txt")
    once = functools.cache(read)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "read_bpe", lambda *paths: (once if paths == own else read)(*paths))
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A small model as pipe.save writes it, its configuration in the file: it draws 64x64 pixels."""
    from tests.weights import tiny_pipeline

    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    tiny_pipeline().save(path)
    return path


@pytest.fixture(scope="session")
def shallow_checkpoint(tmp_path_factory) -> Path:
    """A smaller one, where depth shows nothing: it draws 16x16 pixels in a third of the time."""
    from tests.weights import shallow_pipeline

    path = tmp_path_factory.mktemp("weights") / "shallow.safetensors"
    shallow_pipeline().save(path)
    return path


def _mounted(folder: Path, *options: str) -> Iterator[Path]:
    """Mount something on the folder while a test runs; skip the test where that is not allowed."""
    try:
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount program")
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    (tmp_path / "small").mkdir()
    yield from _mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=64k", "none")


@pytest.fixture
def read_only_disk(tmp_path) -> Iterator[Path]:
    """A file system mounted read-only, which binds root too."""
    (tmp_path / "read-only").mkdir()
    yield from _mounted(tmp_path / "read-only", "-t", "tmpfs", "-o", "ro,size=64k", "none")

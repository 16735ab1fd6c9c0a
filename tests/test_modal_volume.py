"""modal_volume.py through the real client and container: a download that is cut off, wrong bytes, and a second run."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import modal_volume
from tests.test_download import CONTENT, SHA256, Server, drop_after, page

pytest_plugins = ["tests.modal_fixtures"]

ROOT = Path(modal_volume.__file__).parent
NAME = "model.safetensors"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def put(loopback, server, *more: object):
    """`modal run modal_volume.py` for the server's file."""
    arguments = ["--url", server.url, "--sha256", SHA256, "--name", NAME, *more]
    return loopback.run("run", "modal_volume.py", *arguments)


def stored(loopback) -> list[str]:
    return sorted(path.name for path in loopback.plane.volume("sd-weights").iterdir())


def one_line_error(result, words: str) -> None:
    assert result.code == 2, result.text
    assert "Traceback" not in result.text
    assert words in re.fullmatch(r"error: ([^\n]*)\n", result.errors)[1]


@pytest.mark.full(memory=False)
def test_a_connection_that_drops_twice_and_a_second_run(loopback, server):
    server.answers = [drop_after(100_000), drop_after(50_000)]
    result = put(loopback, server)
    assert result.code == 0, result.text
    assert "sha256 is right" in result.out
    assert "100%" in result.text  # its progress, from the container
    assert stored(loopback) == [NAME, f"{NAME}.sha256"]
    assert (loopback.plane.volume("sd-weights") / NAME).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert "vo-sd-weights" in loopback.plane.commits
    check_request(loopback.plane)

    again = put(loopback, server)
    assert again.code == 0
    assert "is in the volume sd-weights already" in again.out
    assert len(loopback.plane.tasks) == 1  # no second container
    assert len(server.requests) == 3

    shown = loopback.run("run", "modal_volume.py", "--list")
    assert f"{len(CONTENT) / 1e9:.2f} GB  {NAME}" in shown.out
    assert loopback.run("run", "modal_volume.py", "--remove", NAME).code == 0
    assert stored(loopback) == []


def check_request(plane) -> None:
    """One container without a GPU, an hour, the volume writable, no retries; sd/ and nothing else is uploaded."""
    asked = plane.function("fetch").definition
    assert asked.concurrency_limit == 1
    assert asked.timeout_secs == 3600
    assert asked.retry_policy.retries == 0
    assert asked.resources.gpu_config.count == 0
    assert [(m.mount_path, m.read_only) for m in asked.volume_mounts] == [("/root/weights", False)]
    found = {path for path in plane.uploaded(plane.function("fetch")) if path.startswith("/root/")}
    assert "/root/sd/download.py" in found
    assert all(path.endswith(".py") for path in found)


def test_wrong_bytes_leave_nothing(loopback, server, monkeypatch):
    server.answers = [page] * 9
    monkeypatch.setenv("LOOPBACK_NAMESPACES", "0")  # and so that both kinds of container are tested everywhere
    result = put(loopback, server)
    one_line_error(result, "does not hold the right file")
    assert stored(loopback) == []


@pytest.mark.full(memory=False)
def test_a_file_that_was_put_there_by_hand(loopback, server):
    """Without a record of its sha256, the container reads it; another file stays and is an error."""
    file = loopback.plane.volume("sd-weights") / NAME
    file.write_bytes(b"another model")
    one_line_error(put(loopback, server), "is there and is another file")
    assert file.read_bytes() == b"another model"
    one_line_error(loopback.run("run", "modal_volume.py", "--remove", "x.ckpt"), "there is no x.ckpt")
    assert server.requests == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sha256": "0" * 64}, "give its --url too"),
        ({"url": "ftp://x/y.ckpt", "sha256": "0" * 64}, "--url must begin with https://"),
        ({"url": "https://x/y.zip", "sha256": "0" * 64}, "must be a file name that ends in .safetensors or .ckpt"),
        ({"name": "../x.ckpt"}, "must be a file name"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as left:
        modal_volume.main.info.raw_f(**arguments)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_the_checkpoint_and_the_pins():
    assert modal_volume.TQDM in (ROOT / "requirements.txt").read_text().split()
    assert hashlib.sha256(CONTENT).hexdigest() == SHA256

"""Files that are there whole or not at all."""

import os

import pytest

from sd.writing import write_whole, written_whole


def test_a_full_disk_leaves_nothing_and_what_was_there(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "old").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="No space"):
            write_whole(tmp_path / name, b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with written_whole(tmp_path / "x") as part:
            part.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_permissions_are_the_umasks(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "x", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "x").read_bytes() == b"x"

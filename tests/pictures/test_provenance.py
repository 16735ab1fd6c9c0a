"""Telling files apart without reading gigabytes, and finding again those that a picture names."""

import json
from pathlib import Path

import pytest

from sd.pictures.provenance import BLOCK, BLOCKS, ProvenanceError, checkpoint_again, file_again, fingerprint


def test_any_file_that_differs_in_a_sampled_block_or_in_size_is_another(tmp_path):
    size = 3 * BLOCK * BLOCKS
    whole = bytes(size)
    found = set()
    changes = [b"", b"\0", *(place for place in (0, size - 1, (size - BLOCK) * 17 // (BLOCKS - 1)))]
    for change in changes:
        data = whole + change if isinstance(change, bytes) else whole[:change] + b"x" + whole[change + 1 :]
        (tmp_path / "x").write_bytes(data)
        found.add(fingerprint(tmp_path / "x"))
    assert len(found) == len(changes)
    assert all(len(digits) == 12 and int(digits, 16) >= 0 for digits in found)
    assert fingerprint(tmp_path / "missing") == ""


def test_an_index_stands_for_the_files_that_it_names(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    index = tmp_path / "x.index.json"
    index.write_text(json.dumps({"weight_map": {"one": "a", "two": "a"}}))
    before = fingerprint(index)
    (tmp_path / "a").write_bytes(b"b")
    assert fingerprint(index) != before
    index.write_text("no JSON")
    assert fingerprint(index) == ""


def test_what_a_picture_names_is_found_by_its_bytes(tmp_path):
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / name).write_text(name)
    wanted, other = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    assert checkpoint_again("a.ckpt", fingerprint(wanted), [other, wanted]) == wanted
    with pytest.raises(ProvenanceError, match=r"the checkpoint a\.ckpt .* name it with --ckpt"):
        checkpoint_again("a.ckpt", fingerprint(wanted), [other, Path("missing")])
    assert file_again("--init-image", "elsewhere/a.ckpt", fingerprint(wanted), tmp_path) == str(wanted)
    with pytest.raises(ProvenanceError, match="name that file with --init-image"):
        file_again("--init-image", "b.ckpt", fingerprint(wanted), tmp_path)

"""Every format is read bit by bit, and every file that is none is answered with one line."""

import os
import random
import struct
from pathlib import Path

import pytest
import torch

from bench.reference.weights import schedule_buffers, write_ckpt, write_safetensors
from sd import model_loader
from tests.checkpoints.common import SMALL, assert_same, error_of
from tests.weights import random_models


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["saved", "safetensors", "ckpt", "legacy"])
def test_round_trip_is_bit_exact(tmp_path, kind, dtype):
    expected = random_models(SMALL, dtype=dtype)
    path = tmp_path / "weights.ckpt"  # the content decides what it is
    if kind == "saved":
        model_loader.save(path, SMALL, *expected)
    elif kind == "safetensors":
        write_safetensors(path, expected, **schedule_buffers())
    else:
        write_ckpt(path, expected, legacy=kind == "legacy")
    config, *loaded = model_loader.load(path, dtype=dtype)
    assert_same(loaded, expected, dtype)
    assert config.unet == SMALL.unet
    assert (config == SMALL) == (kind == "saved")
    assert not any(p.requires_grad for m in loaded for p in m.parameters())
    assert not any(m.training for m in loaded)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_may_be_called_safetensors(tmp_path, models, legacy):
    path = tmp_path / "weights.safetensors"
    write_ckpt(path, models, legacy=legacy)
    assert_same(model_loader.load(path)[1:], models)


NOT_WEIGHTS = {
    b"": "empty",
    b"<!DOCTYPE html><html>": "web page",
    b"\n <html>": "web page",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:6ce0": "git lfs pull",
    b"\x80": "checkpoint",
    b"hello": "not a checkpoint",
    b"{}": "index",
    b'{"weight_map": 5}': "index",
    b'{"weight_map": {"a": "../../etc/passwd"}}': "outside its folder",
    b'{"weight_map": {"a": "nowhere.safetensors"}}': "no such file",
    b"PK\x03\x04": "damaged",
    struct.pack("<Q", 1 << 60) + b"{": "not a checkpoint",
    struct.pack("<Q", 2) + b"{}": "lacks",
}


@pytest.mark.parametrize("content", NOT_WEIGHTS, ids=range(len(NOT_WEIGHTS)))
def test_files_that_are_not_weights(tmp_path, content):
    (tmp_path / "weights.ckpt").write_bytes(content)
    assert NOT_WEIGHTS[content] in error_of(tmp_path / "weights.ckpt")


def test_paths_that_are_not_files(tmp_path):
    assert "no such file" in error_of(tmp_path / "absent.ckpt")
    assert "a folder" in error_of(tmp_path)
    assert "not a regular file" in error_of(Path("/dev/zero"))


def test_random_bytes(tmp_path):
    for seed in range(50):
        (tmp_path / "weights.ckpt").write_bytes(random.Random(seed).randbytes(4096))
        assert "checkpoint" in error_of(tmp_path / "weights.ckpt")


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated(tmp_path, models, kind, share):
    path = tmp_path / "weights"
    write_safetensors(path, models) if kind == "safetensors" else write_ckpt(path, models, legacy=kind == "legacy")
    os.truncate(path, int(path.stat().st_size * share))
    assert "truncated or damaged" in error_of(path)

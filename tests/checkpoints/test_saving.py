"""What is written is there whole or not at all, and loads as it was."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench.reference.weights import TINY
from sd import model_loader
from sd.checkpoints.errors import CheckpointError
from sd.checkpoints.layouts import TOKEN_TABLE
from tests.checkpoints.common import ROOT, SMALL, assert_same, error_of


def test_saving_over_the_mapped_file(tmp_path, models):
    path = tmp_path / "weights.safetensors"
    model_loader.save(path, SMALL, *models)
    config, *loaded = model_loader.load(path)
    model_loader.save(path, replace(config, image_size=128), *loaded)
    assert_same(loaded, models)
    config, *loaded = model_loader.load(path)
    assert_same(loaded, models)
    assert config.image_size == 128
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_compact_token_table(tmp_path, models):
    ids = [3, 63, 5]
    model_loader.save(tmp_path / "weights.safetensors", SMALL, *models, token_ids=ids)
    _, clip, *rest = model_loader.load(tmp_path / "weights.safetensors")
    expected = torch.zeros_like(models[0].embeddings.token_embedding.weight)
    expected[ids] = models[0].embeddings.token_embedding.weight[ids]
    assert torch.equal(clip.embeddings.token_embedding.weight, expected)
    assert_same(rest, models[1:])
    stored, _ = model_loader.read_state_dict(tmp_path / "weights.safetensors")
    assert stored[TOKEN_TABLE].shape == (3, SMALL.text.width)


def test_split_checkpoint(tmp_path, models):
    model_loader.save(tmp_path / "weights.safetensors", SMALL, *models, max_bytes=1_000_000, token_ids=range(64))
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files[0].startswith("weights-00001-of-0000")
    assert files[-1] == "weights.safetensors.index.json"
    assert len(files) > 3
    assert all(p.stat().st_size < 1_100_000 for p in tmp_path.iterdir())
    config, *loaded = model_loader.load(tmp_path / files[-1])
    assert config == SMALL
    assert_same(loaded, models)
    index = json.loads((tmp_path / files[-1]).read_text())
    assert set(index["weight_map"].values()) == set(files[:-1])
    (tmp_path / files[1]).unlink()
    assert f"{files[1]}: no such file" in error_of(tmp_path / files[-1])


def test_saving_where_it_cannot_be_written(tmp_path, models):
    for path in (tmp_path / "absent" / "weights.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be written"):
            model_loader.save(path, SMALL, *models)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk."""
    code = (
        "import resource, signal\n"
        "from bench.reference.weights import random_models\n"
        "from sd import model_loader\n"
        "from tests.checkpoints.common import SMALL\n"
        "models = random_models(SMALL)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try: model_loader.save('weights.safetensors', SMALL, *models)\n"
        "except model_loader.CheckpointError as error: print(error)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "cannot be written" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_saved_file_has_the_usual_permissions(tmp_path, models):
    model_loader.save(tmp_path / "weights.safetensors", SMALL, *models)
    (tmp_path / "other").touch()
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_saving_changed_modules_is_refused(tmp_path, models):
    with pytest.raises(CheckpointError, match="differ from their configuration"):
        model_loader.save(tmp_path / "weights.safetensors", TINY, *models)
    assert list(tmp_path.iterdir()) == []

"""Folders like diffusers' that lie, have no end or would run something: one line that names the folder, at once."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.reference.weights import tiny_config
from sd import model_loader
from sd.checkpoints.folders import write_folder
from sd.inspection import inspect
from sd.pictures.provenance import fingerprint
from sd.tokenizer import DATA
from tests.checkpoints.common import error_of
from tests.checkpoints.test_pickles import payloads
from tests.weights import random_models

SMALL = tiny_config(unet={"channel_mult": (1, 2), "attention_levels": (0,)}, vae={"ch_mult": (1, 2)}, image_size=16)
WEIGHTS = "unet/diffusion_pytorch_model"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    from bench.reference.weights import original_layout

    path = tmp_path_factory.mktemp("folders") / "whole"
    path.mkdir()
    write_folder(path, original_layout(random_models(SMALL)), SMALL, DATA)
    model_loader.load(path)
    return path


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def replaced(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    """Something else in the place of a file or a folder."""
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    make(path)


def long_file(path: Path) -> None:
    """20 GB of which none are on the disk."""
    path.touch()
    os.truncate(path, 20 << 30)


ODD: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a circle": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("absent"),
    "a folder": lambda path: path.mkdir(),
    "20 GB of zeros": long_file,
    "nothing in it": lambda path: path.touch(),
    "deep JSON": lambda path: path.write_text("[" * 500_000),
    "2 MB of JSON": lambda path: path.write_text(json.dumps({"a": "x" * (2 << 20)})),
    "a long number": lambda path: path.write_text('{"a": ' + "9" * 10_000 + "}"),
    "no text": lambda path: path.write_bytes(b"\xff\xfe{"),
}
FILES = ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", f"{WEIGHTS}.safetensors", "vae"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("odd", ODD)
def test_something_else_in_a_place(folder, odd, name):
    """Told by the loader; what looks at the folder without loading it ends too."""
    replaced(folder, name, ODD[odd])
    error_of(folder)
    assert len(fingerprint(folder)) in (0, 12)
    with pytest.raises(model_loader.CheckpointError):
        inspect(folder)


@pytest.mark.parametrize("odd", ["a pipe", "a device", "20 GB of zeros", "a circle"])
def test_the_same_of_an_autoencoder_that_is_named(whole, folder, odd):
    for name in ("vae/config.json", "vae/diffusion_pytorch_model.safetensors"):
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        replaced(folder, name, ODD[odd])
        if odd in ("a pipe", "a device", "a circle") and name.endswith("config.json"):
            model_loader.load(whole, vae=folder)  # without a file that says it, its scale is that of the model
            continue
        with pytest.raises(model_loader.CheckpointError) as caught:
            model_loader.load(whole, vae=folder)
        assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("name", ["posix.system", "builtins.eval", "subprocess.Popen"])
def test_a_pickle_runs_nothing(folder, tmp_path, name, form):
    tensors = load_file(folder / f"{WEIGHTS}.safetensors")
    (folder / f"{WEIGHTS}.safetensors").unlink()
    content = {**tensors, "extra": payloads(marker := tmp_path / "executed")[name]}
    torch.save(content, folder / f"{WEIGHTS}.bin", _use_new_zipfile_serialization=form == "zip")
    assert f"unet/diffusion_pytorch_model.bin: refuses to run {name}" in error_of(folder)
    assert not marker.exists()


CLAIMS = {
    "a file outside": {"a": "../vae/diffusion_pytorch_model.safetensors"},
    "an absolute path": {"a": "/dev/zero"},
    "a folder above": {"a": ".."},
    "itself": {"a": "diffusion_pytorch_model.safetensors.index.json"},
    "no file's name": {"a": 7},
    "a zero byte": {"a": "x\0.safetensors"},
    "a long name": {"a": "x" * 5000},
    "a list": ["a"],
    "100,000 files": {f"t{i}": f"{i}.safetensors" for i in range(100_000)},
    "terminal codes": {"a": "\x1b[2J\n.safetensors"},
    "nothing": {},
    "a pipe": {"a": "pipe.safetensors"},
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_an_index_claims(folder, claim):
    os.mkfifo(folder / "unet" / "pipe.safetensors")
    index = {"metadata": {"total_size": 10**30}, "weight_map": CLAIMS[claim]}
    (folder / f"{WEIGHTS}.safetensors").unlink()
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index))
    error_of(folder)
    assert len(fingerprint(folder / f"{WEIGHTS}.safetensors.index.json")) in (0, 12)

"""The models are filled with all of a checkpoint's tensors, of any type and shape in memory, or not at all."""

import itertools
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.reference.weights import TINY, Models, original_layout, write_ckpt
from sd import model_loader
from sd.checkpoints.errors import CheckpointError
from sd.checkpoints.layouts import PREFIXES, TOKEN_IDS, TOKEN_TABLE
from sd.config import SD15
from sd.models import build
from sd.pipeline import StableDiffusion
from tests.checkpoints.common import SMALL, assert_same, error_of
from tests.sparing import sparing
from tests.weights import random_models


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion(tmp_path, models, dtype):
    write_ckpt(tmp_path / "weights.ckpt", models)
    assert_same(model_loader.load(tmp_path / "weights.ckpt", dtype=dtype)[1:], models, dtype)


def test_views_and_strides(tmp_path, models, tensors):
    stored = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in tensors.items()}
    biases = torch.cat([t for t in tensors.values() if t.ndim == 1])
    offset = 0
    for name, t in tensors.items():
        if t.ndim == 1:
            stored[name] = biases[offset : offset + len(t)]
            offset += len(t)
    torch.save(stored, tmp_path / "weights.ckpt")
    config, *loaded = model_loader.load(tmp_path / "weights.ckpt")
    assert_same(loaded, models)
    assert all(p.is_contiguous() for m in loaded for p in m.parameters())
    model_loader.save(tmp_path / "again.safetensors", config, *loaded)
    assert_same(model_loader.load(tmp_path / "again.safetensors")[1:], models)


def test_leftovers_are_listed_at_debug_level(tmp_path, models, caplog):
    write_ckpt(tmp_path / "weights.ckpt", models)
    with caplog.at_level("DEBUG", logger="sd.model_loader"):
        model_loader.load(tmp_path / "weights.ckpt")
    assert "alphas_cumprod" in caplog.text
    assert "position_ids" in caplog.text


@pytest.mark.parametrize("legacy", [False, True])
def test_ema_picks_the_averaged_unet(tmp_path, models, legacy):
    averaged = random_models(SMALL, seed=1)[1]
    write_ckpt(tmp_path / "weights.ckpt", models, ema=averaged, legacy=legacy)
    assert_same(model_loader.load(tmp_path / "weights.ckpt")[1:], models)
    assert_same(model_loader.load(tmp_path / "weights.ckpt", ema=True)[1:], (models[0], averaged, models[2]))


def test_ema_is_asked_of_a_file_without(tmp_path, models):
    write_ckpt(tmp_path / "weights.ckpt", models)
    assert "has no EMA weights" in error_of(tmp_path / "weights.ckpt", ema=True)


def test_a_missing_ema_tensor_is_named(tmp_path, models, tensors):
    save_file({**tensors, "model_ema.diffusion_modelout2bias": torch.zeros(4)}, tmp_path / "a.safetensors")
    assert "model_ema.diffusion_modeltime_embed0weight" in error_of(tmp_path / "a.safetensors", ema=True)


def test_missing_and_misshapen_tensors_are_named(tmp_path, tensors):
    name = PREFIXES["vae"] + "decoder.conv_in.bias"
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "a.safetensors")
    assert f"lacks 1 of {len(tensors)} tensors: {name}" in error_of(tmp_path / "a.safetensors")
    save_file({**tensors, name: torch.zeros(5)}, tmp_path / "b.safetensors")
    assert f"{name} is (5,), not (64,)" in error_of(tmp_path / "b.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith(PREFIXES["vae"])}, tmp_path / "c.safetensors")
    assert "lacks first_stage_model." in error_of(tmp_path / "c.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_weight_anywhere(tmp_path, tensors, value, dtype):
    generator = random.Random(int(dtype.itemsize))
    for name in generator.sample(sorted(tensors), 2):
        bad = tensors[name].to(dtype, copy=True)
        bad.view(-1)[generator.randrange(bad.numel())] = value
        save_file({**tensors, name: bad}, tmp_path / "weights.safetensors")
        assert f"{name} holds NaN or infinite" in error_of(tmp_path / "weights.safetensors")


def test_weights_beyond_fp16(tmp_path, tensors):
    name = PREFIXES["unet"] + "out.2.bias"
    save_file({**tensors, name: tensors[name] + 1e5}, tmp_path / "weights.safetensors")
    model_loader.load(tmp_path / "weights.safetensors", dtype=torch.bfloat16)
    assert "beyond the range of torch.float16" in error_of(tmp_path / "weights.safetensors", dtype=torch.float16)


@pytest.mark.parametrize("legacy", [False, True])
def test_sizes_that_the_file_does_not_hold(tmp_path, legacy):
    """SD 1.5's 4.27 GB claimed by strides of 0."""
    meta = original_layout(build(SD15))
    claimed = {name: torch.zeros(1).expand(t.shape) for name, t in meta.items()}
    torch.save(claimed, tmp_path / "weights.ckpt", _use_new_zipfile_serialization=not legacy)
    assert "claims 426" in error_of(tmp_path / "weights.ckpt")


@pytest.mark.parametrize("ids", [[0, 0, 1], [0, 1, 64], [-1, 0, 1], [0, 1], [0.0, 1.0, 2.0], [[0, 1, 2]]])
def test_bad_token_ids(tmp_path, tensors, ids):
    rows = {TOKEN_TABLE: torch.zeros(3, 64), TOKEN_IDS: torch.tensor(ids)}
    save_file({**tensors, **rows}, tmp_path / "weights.safetensors", metadata={"config": SMALL.to_json()})
    error_of(tmp_path / "weights.safetensors")


# --- Weights that are read again -------------------------------------------------------------------------------------


def written(folder: Path, kind: str, dtype: torch.dtype) -> tuple[Path, Models]:
    """A checkpoint of this kind and what is to be loaded from it (for "ema", the averaged UNet)."""
    clip, unet, vae = random_models(SMALL, dtype=dtype)
    path = folder / "weights.safetensors"
    if kind == "ema":
        averaged = random_models(SMALL, seed=1, dtype=dtype)[1]
        write_ckpt(path, (clip, unet, vae), ema=averaged)
        return path, (clip, averaged, vae)
    if kind in ("ckpt", "legacy"):
        write_ckpt(path, (clip, unet, vae), legacy=kind == "legacy")
        return path, (clip, unet, vae)
    ids, max_bytes = [3, 63, 5] if kind == "compact" else None, 1_000_000 if kind == "split" else None
    model_loader.save(path, SMALL, clip, unet, vae, token_ids=ids, max_bytes=max_bytes)
    if ids:
        others = torch.tensor([i for i in range(SMALL.text.vocab_size) if i not in ids])
        clip.embeddings.token_embedding.weight[others] = 0
    return folder / "weights.safetensors.index.json" if max_bytes else path, (clip, unet, vae)


def in_files(folder: Path, tensors: dict[str, Tensor]) -> set[str]:
    """Names of the tensors whose memory is that of a file in the folder, as Linux says."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    bounds = [line[0].split("-") for line in lines if len(line) == 6 and line[5].startswith(f"{folder}/")]
    ranges = [(int(first, 16), int(last, 16)) for first, last in bounds]
    return {name for name, t in tensors.items() if any(first <= t.data_ptr() < last for first, last in ranges)}


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
@pytest.mark.parametrize(
    ("stored", "dtype"),
    sparing(
        itertools.product([torch.float32, torch.float16], repeat=2), lambda pair: pair == (torch.float32, torch.float16)
    ),
)
@pytest.mark.parametrize("kind", ["saved", "ckpt", "legacy", "ema", "compact", "split"])
def test_weights_are_read_again_as_they_were_loaded(tmp_path, monkeypatch, kind, stored, dtype):
    path, expected = written(tmp_path, kind, stored)
    monkeypatch.chdir(tmp_path)
    pipe = StableDiffusion.load(path.name, "cpu", dtype, ema=kind == "ema")
    monkeypatch.chdir("/")
    for part, model in zip(PREFIXES, expected, strict=True):
        loaded = getattr(pipe, part).state_dict()
        again = model_loader.read_weights(pipe.source, pipe.config, part, loaded.keys())
        assert again.keys() == loaded.keys()
        for name, tensor in model.state_dict().items():
            assert again[name].dtype == dtype
            assert torch.equal(again[name], tensor.to(dtype)), name
            assert again[name].data_ptr() != loaded[name].data_ptr()
        from_file = in_files(tmp_path, again)
        assert from_file == in_files(tmp_path, loaded)
        expanded = {"embeddings.token_embedding.weight"} if kind == "compact" else set()
        assert from_file == (again.keys() - expanded if stored == dtype and kind != "legacy" else set())


def test_weights_that_were_changed_in_memory_are_read_as_they_were(tmp_path, models):
    model_loader.save(tmp_path / "weights.safetensors", SMALL, *models)
    pipe = StableDiffusion.load(tmp_path / "weights.safetensors", "cpu", torch.float32)
    pipe.unet.out[2].weight.add_(1)
    again = model_loader.read_weights(pipe.source, SMALL, "unet", ["out.2.weight"])
    assert again.keys() == {"out.2.weight"}
    assert torch.equal(again["out.2.weight"], models[1].out[2].weight)


def test_a_file_that_has_changed_is_not_read_again(tmp_path, models):
    path = tmp_path / "weights.safetensors"
    model_loader.save(path, SMALL, *models)
    pipe = StableDiffusion.load(path, "cpu", torch.float32)
    with pytest.raises(CheckpointError, match="tensors have another shape"):
        model_loader.read_weights(pipe.source, TINY, "clip", ["embeddings.token_embedding.weight"])
    pipe.save(path)
    with pytest.raises(CheckpointError, match=f"^{path}: has changed since it was loaded"):
        model_loader.read_weights(pipe.source, SMALL, "vae", ["post_quant_conv.bias"])
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        model_loader.read_weights(pipe.source, SMALL, "vae", ["post_quant_conv.bias"])


def test_a_pipeline_of_models_has_no_source(models):
    assert StableDiffusion(SMALL, *models).source is None

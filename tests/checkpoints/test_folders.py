"""Folders that diffusers wrote, read: SD 1, SD 2, split, half, pickled; and what is wrong with others, by name."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.reference.oracles import ddim_scheduler, diffusers_pipeline
from bench.reference.weights import TINY_SD2, tiny_config
from sd import model_loader
from sd.inspection import inspect
from sd.pipeline import StableDiffusion
from tests.checkpoints.common import assert_same, error_of
from tests.weights import random_models

SD1 = tiny_config(unet={"channel_mult": (1, 2), "attention_levels": (0,)}, vae={"ch_mult": (1, 2)}, image_size=16)
CONFIGS = {"SD 1": SD1, "SD 2": replace(TINY_SD2, prediction="v")}


def write(path, config, **options):
    """By diffusers; returns the models."""
    models = random_models(config, seed=3)
    theirs = diffusers_pipeline(StableDiffusion(config, *models), ddim_scheduler())
    theirs.unet.register_to_config(sample_size=config.image_size // config.vae.downsampling)
    named = {"v": "v_prediction", "eps": "epsilon"}[config.prediction]
    theirs.scheduler.register_to_config(prediction_type=named)
    theirs.save_pretrained(path, **options)
    return models


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "model", SD1)
    return tmp_path / "model"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("options", [{}, {"safe_serialization": False}, {"max_shard_size": "1MB"}, {"variant": "fp16"}])
def test_what_diffusers_wrote_is_read(tmp_path, caplog, name, options):
    models = write(tmp_path / "m", CONFIGS[name], **options)
    for path in (tmp_path / "m", tmp_path / "m" / "model_index.json"):
        config, *loaded = model_loader.load(path)
        assert replace(config, name=CONFIGS[name].name) == CONFIGS[name]
        assert_same(loaded, models)
    assert not caplog.text
    assert "left over   nothing unusual" in inspect(tmp_path / "m")


def test_older_names(folder):
    """The autoencoder's attention as it was called until 2023, the text encoder with and without its level."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    before = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for now, then in before.items():
        tensors = {name.replace(f"attentions.0.{now}.", f"attentions.0.{then}."): t for name, t in tensors.items()}
    save_file(tensors, file)
    text = folder / "text_encoder" / "model.safetensors"
    state = {name.removeprefix("text_model."): t for name, t in load_file(text).items()}
    for level in ("", "text_model."):
        ids = {f"{level}embeddings.position_ids": torch.arange(77)[None]}
        save_file({**{level + name: t for name, t in state.items()}, **ids}, text)
        assert_same(model_loader.load(folder)[1:], random_models(SD1, seed=3))


def test_weights_are_mapped_and_read_again(folder):
    pipe = StableDiffusion.load(folder, "cpu")
    read = model_loader.read_weights(pipe.source, pipe.config, "unet", ["out.2.weight"])
    assert torch.equal(read["out.2.weight"], pipe.unet.out[2].weight)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file)
    with pytest.raises(model_loader.CheckpointError, match="changed since"):
        model_loader.read_weights(pipe.source, pipe.config, "unet", ["out.2.weight"])


def edited(folder, file, **changes):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "Stable Diffusion XL"),
        ("model_index.json", {"transformer": ["diffusers", "FluxTransformer2DModel"]}, "Flux"),
        ("unet/config.json", {"class_embed_type": "projection"}, "class_embed_type is 'projection'"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256"),
        ("unet/config.json", {"in_channels": 8}, "instruct-pix2pix"),
        ("unet/config.json", {"block_out_channels": [32, 10**9]}, "block_out_channels is 1000000000"),
        ("unet/config.json", {"block_out_channels": "x"}, "not a list"),
        ("unet/config.json", {"layers_per_block": 10**6}, "tensors"),
        ("unet/config.json", {"attention_head_dim": [3, 8]}, "attention_head_dim"),
        ("unet/config.json", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D"),
        ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor is 'x'"),
        ("vae/config.json", {"use_quant_conv": False}, "use_quant_conv"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("text_encoder/config.json", {"num_hidden_layers": 3}, "lacks"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "beta_end is 0.02"),
    ],
)
def test_what_is_not_drawn_is_named(folder, file, changes, said):
    edited(folder, file, **changes)
    assert said in error_of(folder)


def test_damaged_folders(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "unet/diffusion_pytorch_model.safetensors: a truncated or damaged" in error_of(folder)
    weights.unlink()
    assert "unet/ holds no weights" in error_of(folder)
    (folder / "unet" / "config.json").write_text("[" * 100_000)
    assert "unet/config.json is no JSON" in error_of(folder)
    (folder / "model_index.json").write_text("[]")
    assert "model_index.json is not an object" in error_of(folder)
    (folder / "model_index.json").unlink()
    assert "a folder without model_index.json" in error_of(folder)

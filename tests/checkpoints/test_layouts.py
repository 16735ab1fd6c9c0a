"""Names of the original layout, and of what it is not."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from bench.reference.weights import original_layout
from sd import model_loader
from sd.checkpoints.layouts import PREFIXES
from sd.checkpoints.shapes import infer_config
from sd.config import SD15
from sd.models import build
from tests.checkpoints.common import ROOT, assert_same, error_of


def test_the_original_names_and_shapes():
    lines = (ROOT / "tests/checkpoints/sd15_keys.tsv").read_text().splitlines()
    expected = {name: tuple(map(int, shape.split(","))) for name, shape in (line.split("\t") for line in lines)}
    meta = original_layout(build(SD15))
    assert {name: tuple(t.shape) for name, t in meta.items()} == expected
    assert len(expected) == 1130
    assert replace(infer_config(meta), name=SD15.name) == SD15


def test_without_the_text_model_level(tmp_path, models, tensors):
    save_file({name.replace("text_model.", ""): t for name, t in tensors.items()}, tmp_path / "weights.safetensors")
    assert_same(model_loader.load(tmp_path / "weights.safetensors")[1:], models)


@pytest.mark.parametrize(
    ("name", "shape", "family"),
    [
        ("conditioner.embedders.0.transformer.text_model.x", (1,), "Stable Diffusion XL"),
        ("lora_unet_down_blocks_0_attentions_0.lora_up.weight", (1,), "LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", (1,), "LoRA"),
        ("down_blocks.0.resnets.0.conv1.weight", (1,), "diffusers layout"),
        ("control_model.input_blocks.0.0.weight", (1,), "ControlNet"),
        (PREFIXES["unet"] + "input_blocks.0.0.weight", (32, 8, 3, 3), "instruct-pix2pix"),
        (PREFIXES["unet"] + "middle_block.1.transformer_blocks.0.attn2.to_k.weight", (128, 1024), "two families"),
    ],
)
def test_other_families_are_named(tmp_path, tensors, name, shape, family):
    first = PREFIXES["vae"] + "encoder.conv_in.weight"  # with it, a whole model would be there
    rest = {n: t for n, t in tensors.items() if n != first or name.startswith(PREFIXES["unet"])}
    save_file({**rest, name: torch.zeros(shape)}, tmp_path / "weights.safetensors")
    assert family in error_of(tmp_path / "weights.safetensors")

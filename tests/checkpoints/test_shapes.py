"""Shapes tell the configuration, and configurations that no model has are refused at once."""

import time
from dataclasses import replace

import pytest
from safetensors.torch import save_file

from bench.reference.weights import original_layout, tiny_config
from sd.checkpoints.shapes import infer_config
from sd.models import build
from tests.checkpoints.common import SMALL, error_of


@pytest.mark.parametrize(
    "changes",
    [
        {"unet": {"channel_mult": (1, 2, 3), "num_res_blocks": 3, "attention_levels": (1, 2)}},
        {"unet": {"transformer_depth": 2, "model_channels": 64, "attention_levels": (0, 3)}},
        {"text": {"width": 128, "heads": 2, "layers": 5, "max_length": 20}, "unet": {"context_dim": 128}},
        {"vae": {"ch": 64, "ch_mult": (1, 3), "num_res_blocks": 2, "z_channels": 3}, "unet": {"in_channels": 3}},
        {"unet": {"attention_levels": ()}},
    ],
)
def test_shapes_tell_the_configuration(changes):
    config = tiny_config(**changes)
    inferred = infer_config(original_layout(build(config)))
    assert replace(inferred, name=config.name, image_size=config.image_size) == config


@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, text=replace(SMALL.text, layers=1_000_000)).to_json(),
        replace(SMALL, text=replace(SMALL.text, vocab_size=1_000_000)).to_json(),
        replace(SMALL, text=replace(SMALL.text, heads=0)).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, num_res_blocks=1_000_000)).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, transformer_depth=1_000_000)).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, channel_mult=())).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, channel_mult=("1", "2"))).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, channel_mult=(1,) * 100_000)).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, model_channels=999_936)).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, num_heads=7)).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, norm_groups=5)).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, in_channels=9)).to_json(),
        replace(SMALL, vae=replace(SMALL.vae, scale_factor=float("nan"))).to_json(),
        SMALL.to_json().replace("vocab_size", "vocabulary"),
    ],
    ids=range(14),
)
def test_absurd_configurations_fail_fast(tmp_path, tensors, config):
    save_file(tensors, tmp_path / "weights.safetensors", metadata={"config": config})
    start = time.process_time()
    error_of(tmp_path / "weights.safetensors")
    assert time.process_time() - start < 5  # a guard against hanging, not a benchmark

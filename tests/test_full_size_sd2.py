"""Stable Diffusion 2.1's own size, with random weights in its layout, in fp32 against diffusers at 256x256."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from bench.reference import oracles
from bench.reference.numbers import noise, relative_error
from bench.reference.weights import SD21, random_models
from sd import model_loader
from sd.pipeline import StableDiffusion
from tests.test_pipeline import detailed, differ

pytestmark = pytest.mark.full

BOUND = 1e-5


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> StableDiffusion:
    """From 5.2 GB as `v2-1_768-ema-pruned.safetensors` holds them."""
    path = tmp_path_factory.mktemp("full") / "sd21.safetensors"
    model_loader.save(path, SD21, *random_models(SD21, seed=0))
    yield StableDiffusion.load(path, device="cpu", prediction="v")
    path.unlink()


def test_it_is_recognized(pipe):
    assert replace(pipe.config, name=SD21.name) == SD21
    assert sum(p.numel() for m in (pipe.clip, pipe.unet) for p in m.parameters()) == 340_387_840 + 865_910_724


@torch.no_grad()
def test_text_encoder(pipe):
    tokens = pipe.tokenizer(["", "a lighthouse in a storm, oil on canvas"])
    expected = oracles.transformers_clip(pipe.clip, SD21.text)(tokens).last_hidden_state
    assert relative_error(pipe.clip(tokens), expected) < BOUND


@torch.no_grad()
def test_unet(pipe):
    x, context = noise(2, 4, 32, 48), noise(2, 77, 1024, seed=1)
    expected = oracles.diffusers_unet(pipe.unet, SD21.unet)(x, 500, encoder_hidden_states=context).sample
    assert expected.std() > 1e-3
    assert relative_error(pipe.unet(x, torch.tensor(500), context), expected) < BOUND


def test_a_picture(pipe):
    size = {"height": 256, "width": 256}
    ours = pipe.generate("a lighthouse in a storm", "blurry", steps=3, seed=3, sampler="ddim", **size)[0]
    scheduler = DDIMScheduler(**oracles.SCHEDULE, set_alpha_to_one=False, prediction_type="v_prediction")
    theirs = oracles.diffusers_pipeline(pipe, scheduler)(
        "a lighthouse in a storm",
        negative_prompt="blurry",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(3),
        **size,
    ).images[0]
    assert detailed(ours)
    assert differ(ours, theirs) <= 1

"""Stable Diffusion 2: its layout by diffusers' own converters, its pictures beside diffusers' pipeline."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from bench.reference.oracles import SCHEDULE, diffusers_pipeline, diffusers_unet, transformers_clip
from bench.reference.weights import TINY_SD2, ema_layout, random_controlnet
from sd import model_loader, optimizations
from sd.checkpoints.layouts import PREFIXES
from sd.checkpoints.sd2 import OPENCLIP
from sd.controlnet import Control
from sd.inspection import inspect
from sd.pipeline import DATA, StableDiffusion
from sd.prompts import tokenize
from tests.checkpoints.common import assert_same, error_of
from tests.sparing import sparing
from tests.test_pipeline import NEGATIVE, PROMPTS, detailed, differ
from tests.weights import random_models

LAST_NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
DEEP = replace(
    TINY_SD2, unet=replace(TINY_SD2.unet, channel_mult=(1, 2, 2, 2), num_res_blocks=2, attention_levels=(0,))
)
"""With as many blocks as the released models have."""


@pytest.fixture(scope="module")
def models():
    return random_models(TINY_SD2, seed=3)


@pytest.fixture(scope="module")
def written(models, tmp_path_factory):
    """As this program writes it, its metadata left out."""
    folder = tmp_path_factory.mktemp("sd2")
    model_loader.save(folder / "ours.safetensors", TINY_SD2, *models)
    save_file(load_file(folder / "ours.safetensors"), folder / "plain.safetensors")
    return folder / "plain.safetensors"


@pytest.fixture(scope="module")
def released(written, tmp_path_factory):
    """With what the released files have beside: the layer that is not used, the projection of CLIP, schedules."""
    tensors = load_file(written)
    layer = f"{OPENCLIP}transformer.resblocks."
    beside = {name.replace(f"{layer}1.", f"{layer}2."): t + 1 for name, t in tensors.items() if f"{layer}1." in name}
    beside |= {f"{OPENCLIP}text_projection": torch.randn(64, 64), f"{OPENCLIP}logit_scale": torch.tensor(4.6)}
    path = tmp_path_factory.mktemp("released") / "sd2.safetensors"
    save_file({**tensors, **beside, "alphas_cumprod": torch.ones(1000)}, path)
    return path


def test_diffusers_reads_the_text_encoder(models, written):
    clip = models[0]
    oracle = transformers_clip(clip, TINY_SD2.text)
    theirs = convert_open_clip_checkpoint(oracle, load_file(written), OPENCLIP)
    assert {name.removeprefix("text_model.") for name in theirs} == clip.state_dict().keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, clip.state_dict()[name.removeprefix("text_model.")]), name


def test_the_file_has_the_shapes_of_stabilitys(models, written):
    """Which diffusers' converter does not look at: matrices in transformers, convolutions in the autoencoder."""
    tensors = load_file(written)
    unet, vae = PREFIXES["unet"], PREFIXES["vae"]
    projections = [t for name, t in tensors.items() if name.startswith(unet) and ".1.proj_" in name and t.ndim > 1]
    assert projections
    assert all(t.ndim == 2 for t in projections)
    assert tensors[f"{vae}decoder.mid.attn_1.q.weight"].ndim == 4


def test_the_file_is_read_again(models, written, released):
    for path in (written, released):
        config, *loaded = model_loader.load(path)
        assert replace(config, image_size=16, name="tiny SD 2") == TINY_SD2
        assert_same(loaded, models)


def test_what_is_always_beside_is_not_told(released, caplog):
    model_loader.load(released, prediction="eps")
    assert not caplog.text
    assert "left over   nothing unusual" in inspect(released)
    assert "Stable Diffusion 2" in inspect(released)
    assert "guessed: --prediction eps or v decides" in inspect(released)


def test_the_text_encoder_and_unet_against_theirs(models):
    clip, unet, _ = models
    tokens = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(0))
    context = clip(tokens)
    theirs = transformers_clip(clip, TINY_SD2.text)(tokens).last_hidden_state
    torch.testing.assert_close(context, theirs, rtol=1e-5, atol=1e-5)
    x, t = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 900])
    oracle = diffusers_unet(unet, TINY_SD2.unet)
    assert oracle.config.use_linear_projection
    torch.testing.assert_close(unet(x, t, context), oracle(x, t, context).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", sparing(["v", "eps"], lambda case: case == "v"))
def test_a_picture_against_diffusers(released, prediction):
    pipe = StableDiffusion.load(released, "cpu", prediction=prediction)
    (ours,) = pipe.generate(PROMPTS[0], NEGATIVE, 20, 7.5, 11, 32, 48, "ddim")
    named = {"v": "v_prediction", "eps": "epsilon"}[prediction]
    scheduler = DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, prediction_type=named)
    (theirs,) = diffusers_pipeline(pipe, scheduler)(
        PROMPTS[0],
        negative_prompt=NEGATIVE,
        generator=torch.Generator().manual_seed(11),
        height=32,
        width=48,
        num_inference_steps=20,
        guidance_scale=7.5,
    ).images
    assert detailed(ours)
    assert differ(ours, theirs) <= 1


def test_prompts_are_padded_with_zeros(released):
    pipe = StableDiffusion.load(released, "cpu", prediction="v")
    files = {"vocab": str(DATA / "vocab.json"), "merges": str(DATA / "merges.txt")}
    theirs = CLIPTokenizer(**files, pad_token="!", model_max_length=77)
    for prompt in ("", "a fox, sleeping"):
        expected = theirs(prompt, padding="max_length", return_tensors="pt").input_ids
        assert torch.equal(pipe.tokenizer(prompt), expected)
        assert tokenize(prompt, pipe.tokenizer).ids == expected.tolist()


@pytest.mark.parametrize(
    ("spread", "metadata", "asked", "prediction", "side", "told"),
    [
        (0.2, {}, None, "v", 768, True),
        (0.02, {}, None, "eps", 512, True),
        (0.2, {}, "eps", "eps", 512, False),
        (0.02, {}, "v", "v", 768, False),
        (0.02, {"modelspec.prediction_type": "v"}, None, "v", 768, False),
        (0.2, {"modelspec.prediction_type": "epsilon"}, None, "eps", 512, False),
    ],
)
def test_what_it_predicts_is_guessed_and_told(tmp_path, caplog, spread, metadata, asked, prediction, side, told):
    model_loader.save(tmp_path / "a.safetensors", DEEP, *random_models(DEEP))
    tensors = load_file(tmp_path / "a.safetensors")
    bias = tensors[LAST_NORM]
    tensors[LAST_NORM] = bias / bias.std() * spread
    save_file(tensors, tmp_path / "b.safetensors", metadata=metadata)
    config, *_ = model_loader.load(tmp_path / "b.safetensors", prediction=asked)
    assert (config.prediction, config.image_size) == (prediction, side)
    assert ("--prediction eps or v decides" in caplog.text) == told


def test_averaged_weights(models, released, tmp_path):
    other = random_models(TINY_SD2, seed=5)[1]
    averaged = {
        n: t[:, :, 0, 0] if "proj_inweight" in n or "proj_outweight" in n else t for n, t in ema_layout(other).items()
    }
    save_file({**load_file(released), **averaged}, tmp_path / "e.safetensors")
    _, clip, unet, vae = model_loader.load(tmp_path / "e.safetensors", ema=True, prediction="v")
    assert_same((clip, unet, vae), (models[0], other, models[2]))


@pytest.mark.parametrize("names", ["cpu", "packed-qkv,kv-cache", "token-merging=0.5", "int8-weights"])
def test_beside_optimizations(released, names):
    """Heads of 64, two of them at the lower level."""
    plain, fast = (StableDiffusion.load(released, "cpu", prediction="v") for _ in range(2))
    try:
        optimizations.apply(fast, names)
    except optimizations.OptimizationError as error:
        pytest.skip(str(error))
    size = {"height": 32, "width": 32}
    (a,), (b,) = (p.generate("a fox", steps=4, seed=1, sampler="ddim", **size) for p in (plain, fast))
    assert differ(a, b) <= (1 if names in ("cpu", "packed-qkv,kv-cache") else 60)
    optimizations.undo(fast)
    (c,) = fast.generate("a fox", steps=4, seed=1, sampler="ddim", **size)
    assert differ(a, c) == 0


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_controlnet_of_its_family(released, tmp_path, layout):
    """Its files have matrices in transformers, as the UNet's."""
    from PIL import Image

    pipe = StableDiffusion.load(released, "cpu", prediction="v")
    net = random_controlnet(TINY_SD2, seed=2)
    state = {f"control_model.{name}": t for name, t in net.state_dict().items()}
    if layout == "diffusers":
        from bench.reference.oracles import diffusers_controlnet

        state = dict(diffusers_controlnet(net, TINY_SD2.unet).state_dict())
    else:
        state = {name: t[:, :, 0, 0] if "1.proj_" in name and t.ndim == 4 else t for name, t in state.items()}
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "net.safetensors")
    name = pipe.add_control(tmp_path / "net.safetensors")
    for key, tensor in pipe.controlnets.loaded[name].state_dict().items():
        assert torch.equal(tensor, net.state_dict()[key]), key
    control = Control(name, Image.new("RGB", (32, 32), "red"))
    assert pipe.generate("x", steps=1, height=32, width=32, control=[control])


def test_a_damaged_one(released, tmp_path):
    tensors = load_file(released)
    name = f"{OPENCLIP}transformer.resblocks.0.attn.in_proj_weight"
    for damage in (tensors[name][:-1], tensors[name][:, :-1], torch.tensor(1.0)):
        save_file({**tensors, name: damage.clone()}, tmp_path / "d.safetensors")
        assert "self_attn" in error_of(tmp_path / "d.safetensors", prediction="v")
    save_file({k: t for k, t in tensors.items() if k != name}, tmp_path / "d.safetensors")
    assert "lacks" in error_of(tmp_path / "d.safetensors", prediction="v")

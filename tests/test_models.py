"""Every network against an independent implementation: small ones in float64, where 1e-10 leaves no room for a bug."""

import functools
import math
from collections import Counter

import pytest
import torch
from torch import nn

from bench.reference import numbers, oracles
from bench.reference.numbers import relative_error
from bench.reference.weights import tiny_config
from sd.attention import attention, naive_attention
from sd.clip import CLIP
from sd.config import SD15, Config, UNetConfig, VAEConfig
from sd.pipeline import StableDiffusion
from sd.unet import UNet, timestep_embedding
from sd.vae import VAE
from tests.weights import random_models

TIGHT = 1e-10
noise = functools.partial(numbers.noise, dtype=torch.float64)


@pytest.fixture(scope="module")
def small() -> tuple[Config, CLIP, UNet, VAE]:
    config = tiny_config()
    return config, *random_models(config, seed=1, dtype=torch.float64)


@pytest.fixture(scope="module")
def oracle_unet(small):
    return oracles.diffusers_unet(small[2], small[0].unet)


def tokens(config: Config, batch: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.text.vocab_size, (batch, config.text.max_length), generator=generator)


@torch.no_grad()
def test_text_encoder(small):
    config, clip, _, _ = small
    ids = tokens(config, 3)
    expected = oracles.transformers_clip(clip, config.text)(ids).last_hidden_state
    assert relative_error(clip(ids), expected) < TIGHT


@torch.no_grad()
def test_text_is_causal(small):
    config, clip, _, _ = small
    ids = tokens(config, 1)
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % config.text.vocab_size
    before, after = clip(ids), clip(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@torch.no_grad()
def test_text_shorter_than_77():
    config = tiny_config(text={"max_length": 16})
    models = random_models(config, seed=1, dtype=torch.float64)
    ids = tokens(config, 2)
    assert ids.shape == (2, 16)
    expected = oracles.transformers_clip(models[0], config.text)(ids).last_hidden_state
    assert relative_error(models[0](ids), expected) < TIGHT
    assert StableDiffusion(config, *models).encode_prompts(["a cat"], None).shape == (1, 16, config.text.width)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["plain", "variance near eps"])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 16, 16), (2, 8, 24)])
def test_unet(small, oracle_unet, batch, height, width, scale):
    config, _, unet, _ = small
    x = scale * noise(batch, config.unet.in_channels, height, width)
    context = scale * noise(batch, config.text.max_length, config.unet.context_dim, seed=1)
    for t in (1, 999):
        expected = oracle_unet(x, t, encoder_hidden_states=context).sample
        assert relative_error(unet(x, torch.tensor(t), context), expected) < TIGHT


@torch.no_grad()
def test_unet_takes_a_timestep_for_each_picture(small):
    config, _, unet, _ = small
    x = noise(2, config.unet.in_channels, 8, 8)
    context = noise(2, config.text.max_length, config.unet.context_dim, seed=1)
    both = unet(x, torch.tensor([3, 700]), context)
    for i, t in enumerate((3, 700)):
        assert relative_error(both[i : i + 1], unet(x[i : i + 1], torch.tensor(t), context[i : i + 1])) < TIGHT


@torch.no_grad()
@pytest.mark.parametrize("block", ["input", "middle", "output"])
def test_unet_block_by_block(small, oracle_unet, block):
    """The transformers and residual blocks alone, with input of variance near their eps."""
    config, _, unet, _ = small
    ours, theirs = {
        "input": (unet.input_blocks[1], oracle_unet.down_blocks[0]),
        "middle": (unet.middle_block, oracle_unet.mid_block),
        "output": (unet.output_blocks[-1], oracle_unet.up_blocks[-1]),
    }[block]
    which = -1 if block == "output" else 0
    resnet, transformer = theirs.resnets[which], theirs.attentions[which]
    emb = noise(2, 4 * config.unet.model_channels, seed=2)
    context = noise(2, 7, config.unet.context_dim, seed=3)
    for scale in (1.0, 3e-3, 1e-3):
        h = scale * noise(2, ours[0].in_layers[0].num_channels, 8, 8)
        assert relative_error(ours[0](h, emb), resnet(h, emb)) < TIGHT
        h = scale * noise(2, ours[1].norm.num_channels, 8, 8)
        expected = transformer(h, encoder_hidden_states=context).sample
        assert relative_error(ours[1](h, context), expected) < TIGHT


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["plain", "variance near eps"])
def test_vae_encoder(small, scale):
    config, _, _, vae = small
    images = scale * noise(2, 3, 32, 48)
    expected = oracles.diffusers_vae(vae, config.vae).encode(images).latent_dist
    mean, logvar = vae.encode(images)
    assert relative_error(mean, expected.mean) < TIGHT
    assert relative_error(logvar, expected.logvar) < TIGHT
    # Symmetric padding would show first here, where the picture's border is.
    for edge in (mean[..., 0, :] - expected.mean[..., 0, :], mean[..., 0] - expected.mean[..., 0]):
        assert edge.abs().max() < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["plain", "variance near eps"])
def test_vae_decoder(small, scale):
    config, _, _, vae = small
    latents = scale * noise(2, config.vae.z_channels, 4, 6)
    expected = oracles.diffusers_vae(vae, config.vae).decode(latents).sample
    assert relative_error(vae.decode(latents), expected) < TIGHT


@torch.no_grad()
@pytest.mark.parametrize(("bias", "clamped"), [(1000, 20), (-1000, -30)])
def test_logvar_is_clamped(small, bias, clamped):
    wild = VAE(small[0].vae).double()
    wild.quant_conv.bias.fill_(bias)
    logvar = wild.encode(noise(1, 3, 32, 32))[1]
    assert torch.equal(logvar, torch.full_like(logvar, clamped))


def test_eps_of_every_norm():
    """A wrong eps hides behind ordinary input, so each module's is asserted by name."""
    with torch.device("meta"):
        clip, unet, vae = CLIP(SD15.text), UNet(SD15.unet), VAE(SD15.vae)
    seen = Counter()
    for model in (clip, unet, vae):
        for name, module in model.named_modules():
            seen[type(model), type(module)] += 1
            if isinstance(module, nn.LayerNorm):
                assert module.eps == 1e-5, name
            if isinstance(module, nn.GroupNorm):
                transformer = name.endswith(".norm")
                assert module.eps == (1e-6 if model is vae or transformer else 1e-5), name
                assert module.num_groups == 32, name
    # LayerNorm: 2 a layer, 3 a transformer. GroupNorm: 2 a residual block, 1 a transformer or attention, 1 at the end.
    assert (seen[CLIP, nn.LayerNorm], seen[UNet, nn.LayerNorm]) == (2 * 12 + 1, 3 * 16)
    assert (seen[UNet, nn.GroupNorm], seen[VAE, nn.GroupNorm]) == (2 * 22 + 16 + 1, 2 * (10 + 14) + 2 + 2)


def test_the_three_networks_have_the_published_sizes():
    with torch.device("meta"):
        models = CLIP(SD15.text), UNet(SD15.unet), VAE(SD15.vae)
    counts = [sum(p.numel() for p in model.parameters()) / 1e6 for model in models]
    assert counts == pytest.approx([123.06, 859.52, 83.65], abs=0.005)


def test_timestep_embedding_has_cosines_first():
    embedding = timestep_embedding(torch.tensor([7]), 320)[0]
    assert embedding[0] == pytest.approx(math.cos(7))
    assert embedding[160] == pytest.approx(math.sin(7))
    assert embedding[159] == pytest.approx(math.cos(7 * 10000 ** (-159 / 160)))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_against_the_naive_one(causal):
    q, k, v = (noise(2, 3, 11, 8, seed=i) for i in range(3))
    assert relative_error(attention(q, k, v, causal), naive_attention(q, k, v, causal)) < 1e-12


@pytest.mark.parametrize(
    "unet",
    [
        {"channel_mult": (1, 3), "num_res_blocks": 1, "attention_levels": (1,), "num_heads": 2},
        {"channel_mult": (1, 2, 2), "num_res_blocks": 3, "attention_levels": (), "norm_groups": 4},
        {"in_channels": 8, "out_channels": 8, "attention_levels": (0,), "transformer_depth": 2},
    ],
)
@torch.no_grad()
def test_other_shapes_of_unet(unet):
    config = tiny_config()
    cfg = UNetConfig(**{**vars(config.unet), **unet})
    model = random_models(Config(text=config.text, unet=cfg, vae=config.vae), seed=2, dtype=torch.float64)[1]
    side = 2 * cfg.downsampling
    x, context = noise(1, cfg.in_channels, side, side), noise(1, 5, cfg.context_dim, seed=1)
    expected = oracles.diffusers_unet(model, cfg)(x, 10, encoder_hidden_states=context).sample
    assert relative_error(model(x, torch.tensor(10), context), expected) < TIGHT


@pytest.mark.parametrize("vae", [{"ch_mult": (1, 2), "num_res_blocks": 1}, {"z_channels": 8, "ch_mult": (1, 2, 2, 4)}])
@torch.no_grad()
def test_other_shapes_of_vae(vae):
    config = tiny_config()
    cfg = VAEConfig(**{**vars(config.vae), **vae})
    model = random_models(Config(text=config.text, unet=config.unet, vae=cfg), seed=2, dtype=torch.float64)[2]
    images = noise(1, 3, 32, 32)
    oracle = oracles.diffusers_vae(model, cfg)
    assert relative_error(model.encode(images)[0], oracle.encode(images).latent_dist.mean) < TIGHT
    latents = noise(1, cfg.z_channels, 4, 4)
    assert relative_error(model.decode(latents), oracle.decode(latents).sample) < TIGHT


class TestConfig:
    def test_json_round_trip(self):
        for config in (SD15, tiny_config()):
            assert Config.from_json(config.to_json()) == config

    @pytest.mark.parametrize(
        ("height", "width", "hint"),
        [(512, 500, "width 448 or 512"), (100, 512, "height 64 or 128"), (0, 512, "height 64"), (-64, 64, "height 64")],
    )
    def test_sizes_that_do_not_fit(self, height, width, hint):
        with pytest.raises(ValueError, match=hint):
            SD15.check_size(height, width)

    def test_sizes_that_fit(self):
        for size in ((512, 512), (64, 1024), (768, 448)):
            SD15.check_size(*size)

    @pytest.mark.parametrize(
        "text",
        [
            "[]",
            "{}",
            '{"text": {}, "unet": {"colour": 1}, "vae": {}}',
            '{"text": {"layers": "many"}, "unet": {}, "vae": {}}',
        ],
    )
    def test_configurations_that_are_none(self, text):
        with pytest.raises((ValueError, TypeError)):
            Config.from_json(text)

"""The same weights in independent implementations: diffusers' UNet, VAE and pipelines, transformers' text encoder.

The conversion is diffusers' own, so that a mistake in our names cannot cancel out.
"""

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sd.checkpoints.layouts import PREFIXES
from sd.clip import CLIP
from sd.config import TextConfig, UNetConfig, VAEConfig
from sd.controlnet import ControlNet
from sd.pipeline import DATA, StableDiffusion
from sd.unet import UNet
from sd.vae import VAE

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def ddpm_scheduler() -> DDPMScheduler:
    return DDPMScheduler(**SCHEDULE, variance_type="fixed_small")


def ddim_scheduler() -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULE, set_alpha_to_one=False)


def diffusers_unet(unet: UNet, cfg: UNetConfig) -> UNet2DConditionModel:
    attends = [level in cfg.attention_levels for level in range(len(cfg.channel_mult))]
    config = {
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "block_out_channels": [cfg.model_channels * mult for mult in cfg.channel_mult],
        "layers_per_block": cfg.num_res_blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "cross_attention_dim": cfg.context_dim,
        # misnamed: the number of heads, at all levels or at each
        "attention_head_dim": [cfg.heads(cfg.model_channels * mult) for mult in cfg.channel_mult],
        "norm_num_groups": cfg.norm_groups,
        "sample_size": 64,
        "transformer_layers_per_block": cfg.transformer_depth,
        "use_linear_projection": cfg.linear_projections,
    }
    weights = {PREFIXES["unet"] + name: weight for name, weight in unet.state_dict().items()}
    if cfg.linear_projections:
        matrices = [name for name in weights if ".proj_" in name and name.endswith("weight")]
        weights |= {name: weights[name][:, :, 0, 0] for name in matrices}
    with torch.device("meta"):
        oracle = UNet2DConditionModel(**config)
    oracle.load_state_dict(convert_ldm_unet_checkpoint(weights, config), strict=True, assign=True)
    return oracle.eval().requires_grad_(False)


def diffusers_controlnet(net: ControlNet, cfg: UNetConfig) -> ControlNetModel:
    attends = [level in cfg.attention_levels for level in range(len(cfg.channel_mult))]
    config = {
        "in_channels": cfg.out_channels,
        "block_out_channels": [cfg.model_channels * mult for mult in cfg.channel_mult],
        "layers_per_block": cfg.num_res_blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "cross_attention_dim": cfg.context_dim,
        "attention_head_dim": cfg.num_heads,  # the number of heads, as in the UNet
        "norm_num_groups": cfg.norm_groups,
        "transformer_layers_per_block": cfg.transformer_depth,
    }
    with torch.device("meta"):
        oracle = ControlNetModel(**config)
    oracle.load_state_dict(convert_controlnet_checkpoint(net.state_dict(), config), strict=True, assign=True)
    return oracle.eval().requires_grad_(False)


def diffusers_vae(vae: VAE, cfg: VAEConfig) -> AutoencoderKL:
    levels = len(cfg.ch_mult)
    config = {
        "in_channels": cfg.in_channels,
        "out_channels": cfg.in_channels,
        "block_out_channels": [cfg.ch * mult for mult in cfg.ch_mult],
        "layers_per_block": cfg.num_res_blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": cfg.z_channels,
        "norm_num_groups": cfg.norm_groups,
        "scaling_factor": cfg.scale_factor,
    }
    weights = {PREFIXES["vae"] + name: weight for name, weight in vae.state_dict().items()}
    converted = convert_ldm_vae_checkpoint(weights, config)
    for name, weight in converted.items():  # the 1x1 convolutions of the attention are Linear there
        if "attentions" in name and weight.ndim == 4:
            converted[name] = weight[:, :, 0, 0]
    with torch.device("meta"):
        oracle = AutoencoderKL(**config)
    oracle.load_state_dict(converted, strict=True, assign=True)
    return oracle.eval().requires_grad_(False)


def transformers_clip(clip: CLIP, cfg: TextConfig) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.width,
        intermediate_size=4 * cfg.width,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        max_position_embeddings=cfg.max_length,
        hidden_act="gelu" if cfg.openclip else "quick_gelu",
        attn_implementation="sdpa",
    )
    oracle = CLIPTextModel(config).to(next(clip.parameters()).dtype)
    prefix = "text_model." if any(name.startswith("text_model.") for name in oracle.state_dict()) else ""
    weights = {prefix + name: weight for name, weight in clip.state_dict().items()}
    missing, unexpected = oracle.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("position_ids") for name in missing)
    return oracle.eval().requires_grad_(False)


def diffusers_pipeline(pipe: StableDiffusion, scheduler, kind: type = StableDiffusionPipeline, **others):
    """diffusers' pipeline of some kind over the weights of ours, on its device, with a scheduler of diffusers'."""
    vocabulary = {"vocab": str(DATA / "vocab.json"), "merges": str(DATA / "merges.txt")}
    padding = {"pad_token": "!"} if pipe.config.text.openclip else {}
    theirs = kind(
        vae=diffusers_vae(pipe.vae, pipe.config.vae),
        text_encoder=transformers_clip(pipe.clip, pipe.config.text).to(pipe.device),
        tokenizer=CLIPTokenizer(**vocabulary, model_max_length=pipe.config.text.max_length, **padding),
        unet=diffusers_unet(pipe.unet, pipe.config.unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **others,
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs

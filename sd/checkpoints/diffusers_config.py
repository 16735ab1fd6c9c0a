"""The configuration of a diffusers folder, from its JSON files to ours and back.

What these files say and no model here has, such as a UNet that is told a picture's class, is refused by its key.
"""

from collections.abc import Mapping
from typing import Any

from sd.checkpoints.errors import CheckpointError
from sd.config import Config, TextConfig, UNetConfig, VAEConfig

Json = Mapping[str, Any]

FILES = {
    "text_encoder": "text_encoder/config.json",
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}

_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
_ATTENDS, _PLAIN = (
    {"down": "CrossAttnDownBlock2D", "up": "CrossAttnUpBlock2D"},
    {"down": "DownBlock2D", "up": "UpBlock2D"},
)

_ONLY = {
    "text_encoder": {"layer_norm_eps": 1e-5},
    "unet": {
        "act_fn": "silu",
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "attention_type": "default",
        "center_input_sample": False,
        "class_embed_type": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "encoder_hid_dim_type": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_time_scale_shift": "default",
        "time_cond_proj_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
    },
    "vae": {"act_fn": "silu", "mid_block_add_attention": True, "shift_factor": None, "use_quant_conv": True},
    "scheduler": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "trained_betas": None,
    },
}
"""The one value that each of these may have; where it is left out, it has that."""


def config_from(said: Mapping[str, Json]) -> Config:
    """said: the content of each of FILES. Raises CheckpointError for what no model here has."""
    for part, only in _ONLY.items():
        for key, value in only.items():
            if said[part].get(key, value) != value:
                raise CheckpointError(f"{FILES[part]}: {key} is {said[part][key]!r}; only {value!r} is drawn here")
    prediction = said["scheduler"].get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise CheckpointError(f"{FILES['scheduler']}: prediction_type is {prediction!r}; eps and v are drawn here")
    text, unet, vae = _text(said["text_encoder"]), _unet(said["unet"]), _vae(said["vae"])
    side = said["unet"].get("sample_size") or 64
    return Config(
        text=text,
        unet=unet,
        vae=vae,
        image_size=_whole(side, "unet", "sample_size") * vae.downsampling,
        name="Stable Diffusion 2.x" if text.openclip else "Stable Diffusion 1.x",
        prediction=_PREDICTIONS[prediction],
    )


def _text(raw: Json) -> TextConfig:
    raw = raw.get("text_config", raw) if "hidden_size" not in raw else raw
    act = raw.get("hidden_act", "quick_gelu")
    if act not in ("quick_gelu", "gelu"):
        raise CheckpointError(f"{FILES['text_encoder']}: hidden_act is {act!r}; quick_gelu and gelu are known")
    number = lambda key, default: _whole(raw.get(key, default), "text_encoder", key)  # noqa: E731
    if number("intermediate_size", 3072) != 4 * number("hidden_size", 768):
        raise CheckpointError(f"{FILES['text_encoder']}: intermediate_size is not 4 times hidden_size")
    return TextConfig(
        vocab_size=number("vocab_size", 49408),
        width=number("hidden_size", 768),
        layers=number("num_hidden_layers", 12),
        heads=number("num_attention_heads", 12),
        max_length=number("max_position_embeddings", 77),
        openclip=act == "gelu",
    )


def _unet(raw: Json) -> UNetConfig:
    number = lambda key, default: _whole(raw.get(key, default), "unet", key)  # noqa: E731
    widths = _wholes(raw.get("block_out_channels", [320, 640, 1280, 1280]), "unet", "block_out_channels")
    downs = raw.get("down_block_types", [_ATTENDS["down"]] * 3 + [_PLAIN["down"]])
    ups = raw.get("up_block_types", [_PLAIN["up"]] + [_ATTENDS["up"]] * 3)
    attends = [kind == _ATTENDS["down"] for kind in downs] if isinstance(downs, list) else []
    expected = [_kind("up", attention) for attention in reversed(attends)]
    if downs != [_kind("down", attention) for attention in attends] or ups != expected or len(downs) != len(widths):
        raise CheckpointError(f"{FILES['unet']}: these kinds of blocks are not drawn here: {downs}, {ups}")
    if any(width % widths[0] for width in widths):
        raise CheckpointError(f"{FILES['unet']}: block_out_channels are {widths}, not multiples of the first")
    return UNetConfig(
        in_channels=number("in_channels", 4),
        out_channels=number("out_channels", 4),
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=number("layers_per_block", 2),
        attention_levels=tuple(i for i, attention in enumerate(attends) if attention),
        transformer_depth=number("transformer_layers_per_block", 1),
        context_dim=number("cross_attention_dim", 1280),
        norm_groups=number("norm_num_groups", 32),
        linear_projections=raw.get("use_linear_projection", False) is True,
        **_heads(raw, widths),
    )


def _kind(way: str, attention: bool) -> str:
    return (_ATTENDS if attention else _PLAIN)[way]


def _heads(raw: Json, widths: list[int]) -> dict[str, int]:
    """attention_head_dim is the number of heads, whatever its name, at all levels or at each."""
    key = "num_attention_heads" if raw.get("num_attention_heads") else "attention_head_dim"
    said = raw.get(key, 8)
    if not isinstance(said, list):
        return {"num_heads": _whole(said, "unet", key)}
    heads = _wholes(said, "unet", key)
    sizes = {width // count for width, count in zip(widths, heads, strict=False)}
    if len(heads) == len(widths) and len(sizes) == 1:
        return {"head_channels": sizes.pop()}
    if len(set(heads)) == 1:
        return {"num_heads": heads[0]}
    raise CheckpointError(f"{FILES['unet']}: {key} is {heads}, neither heads of one size nor one number of them")


def _vae(raw: Json) -> VAEConfig:
    number = lambda key, default: _whole(raw.get(key, default), "vae", key)  # noqa: E731
    widths = _wholes(raw.get("block_out_channels", [64]), "vae", "block_out_channels")
    if any(width % widths[0] for width in widths):
        raise CheckpointError(f"{FILES['vae']}: block_out_channels are {widths}, not multiples of the first")
    return VAEConfig(
        in_channels=number("in_channels", 3),
        ch=widths[0],
        ch_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=number("layers_per_block", 1),
        z_channels=number("latent_channels", 4),
        norm_groups=number("norm_num_groups", 32),
        scale_factor=scale_of(raw),
    )


def scale_of(raw: Json) -> float:
    """What latents are multiplied by, as an autoencoder's config.json says it."""
    scale = raw.get("scaling_factor", 0.18215)
    if not isinstance(scale, float) or not 0 < scale < 100:
        raise CheckpointError(f"{FILES['vae']}: scaling_factor is {scale!r}")
    return scale


def _whole(value: object, part: str, key: str) -> int:
    if type(value) is not int or not 0 < value <= 1_000_000:
        raise CheckpointError(f"{FILES[part]}: {key} is {value!r}, not a whole number over 0")
    return value


def _wholes(values: object, part: str, key: str) -> list[int]:
    if not isinstance(values, list) or not 0 < len(values) <= 16:
        raise CheckpointError(f"{FILES[part]}: {key} is {values!r}, not a list of whole numbers")
    return [_whole(value, part, key) for value in values]


def config_to(config: Config) -> dict[str, dict[str, Any]]:
    """The content of each of FILES, as diffusers' and transformers' from_pretrained read it."""
    return {
        "text_encoder": _text_json(config.text),
        "unet": _unet_json(config),
        "vae": _vae_json(config.vae),
        "scheduler": _scheduler_json(config.prediction),
    }


def _text_json(text: TextConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": 4 * text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "max_position_embeddings": text.max_length,
        "hidden_act": "gelu" if text.openclip else "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "projection_dim": text.width,
    }


def _unet_json(config: Config) -> dict[str, Any]:
    unet = config.unet
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    attends = [level in unet.attention_levels for level in range(len(widths))]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "sample_size": config.image_size // config.vae.downsampling,
        "block_out_channels": widths,
        "layers_per_block": unet.num_res_blocks,
        "down_block_types": [_kind("down", attention) for attention in attends],
        "up_block_types": [_kind("up", attention) for attention in reversed(attends)],
        "attention_head_dim": [unet.heads(width) for width in widths] if unet.head_channels else unet.num_heads,
        "cross_attention_dim": unet.context_dim,
        "norm_num_groups": unet.norm_groups,
        "transformer_layers_per_block": unet.transformer_depth,
        "use_linear_projection": unet.linear_projections,
        **_ONLY["unet"],
    }


def _vae_json(vae: VAEConfig) -> dict[str, Any]:
    levels = len(vae.ch_mult)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": vae.in_channels,
        "out_channels": vae.in_channels,
        "sample_size": 512,
        "block_out_channels": [vae.ch * mult for mult in vae.ch_mult],
        "layers_per_block": vae.num_res_blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": vae.z_channels,
        "norm_num_groups": vae.norm_groups,
        "scaling_factor": vae.scale_factor,
        "act_fn": "silu",
    }


def _scheduler_json(prediction: str) -> dict[str, Any]:
    """As Stability's folders have it: PNDM, and DDIM for v."""
    said = next(name for name, ours in _PREDICTIONS.items() if ours == prediction)
    own = (
        {"_class_name": "DDIMScheduler"}
        if prediction == "v"
        else {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    )
    shared = {"clip_sample": False, "prediction_type": said, "set_alpha_to_one": False, "steps_offset": 1}
    return {**own, **_ONLY["scheduler"], **shared}

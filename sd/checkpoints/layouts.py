"""How checkpoints call their tensors: the original layout of Stable Diffusion 1.x, and by what others are known."""

import re
from collections.abc import Collection, Iterable

from torch import Tensor

from sd.checkpoints.errors import CheckpointError

PREFIXES = {
    "clip": "cond_stage_model.transformer.text_model.",
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
}

BY_TEXT_WIDTH = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "Stable Diffusion XL",
    2048: "Stable Diffusion XL",
}
"""The family of what attends to a text of this width, or is a word of it."""

TOKEN_TABLE = PREFIXES["clip"] + "embeddings.token_embedding.weight"

TOKEN_IDS = PREFIXES["clip"] + "embeddings.token_embedding.ids"


def ema_name(name: str) -> str:
    """What the original code's LitEma calls a UNet tensor: `out.2.bias` -> `model_ema.diffusion_modelout2bias`."""
    return "model_ema." + f"diffusion_model.{name}".replace(".", "")


def with_text_level(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some versions of transformers wrote the text encoder without the level `text_model.`."""
    full = PREFIXES["clip"]
    outer = full.removesuffix("text_model.")
    if any(name.startswith(full) for name in tensors):
        return tensors
    return {full + name[len(outer) :] if name.startswith(outer) else name: t for name, t in tensors.items()}


# How the tensors of other models are called. The first that fits is named.
_OTHER_FAMILIES = (
    (r"conditioner\.embedders\.", "Stable Diffusion XL"),
    (r"(model\.diffusion_model\.)?label_emb\.", "a model that takes more than text (unCLIP, Stable Diffusion XL)"),
    (r"model\.diffusion_model\.joint_blocks\.", "Stable Diffusion 3"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "Flux"),
    (
        r".*(lora_(unet|te|up|down|A|B)|\.lora\.|hada_w1|lokr_w)",
        "a LoRA, a change to a checkpoint and not one itself: name it with --lora",
    ),
    (r"control_model\.|controlnet_", "a ControlNet"),
    (r"(unet\.)?(down|up)_blocks\.|(en|de)coder\.(down|up)_blocks\.", "one model of the diffusers layout"),
)


_ENDS = {
    "clip": ("embeddings.position_embedding.weight", "final_layer_norm.weight"),
    "unet": ("input_blocks.0.0.weight", "out.2.weight"),
    "vae": ("encoder.conv_in.weight", "decoder.conv_out.weight"),
}
"""The first and the last tensor of each part."""


def has_three_parts(names: Collection[str]) -> bool:
    """Whether text encoder, UNet and VAE are there in the original layout, whatever else is."""
    return all(PREFIXES[part] + end in names for part, ends in _ENDS.items() for end in ends)


_USUAL = re.compile(
    r"model_ema\..*|(log_one_minus_|sqrt_(one_minus_|recipm?1?_?)?)?alphas_cumprod(_prev)?|sqrt_recip(m1)?_alphas_cumprod"
    r"|betas|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar|scale_factor"
    r"|v_pred|ztsnr|cond_stage_model\.(model\.)?(logit_scale|text_projection|attn_mask)"
    r"|cond_stage_model\.model\.transformer\.resblocks\.\d+\..*|(cond_stage_model\.|text_encoder/).*position_ids|first_stage_model\.loss\..*"
)


def unusual(names: Iterable[str]) -> list[str]:
    """Of the tensors that no model takes, those that are not in most checkpoints of Stable Diffusion 1.x."""
    return sorted(name for name in names if not _USUAL.fullmatch(name))


def refuse_other_families(names: Iterable[str]) -> None:
    names = list(names)
    for pattern, family in _OTHER_FAMILIES:
        begins = re.compile(pattern).match
        if any(begins(name) for name in names):
            raise CheckpointError(f"this is {family}; a whole Stable Diffusion 1.x or 2.x is needed")

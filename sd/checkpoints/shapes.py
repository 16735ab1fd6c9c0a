"""Which configuration a checkpoint has: from its metadata, else from the tensors' shapes."""

import json
from dataclasses import replace

import torch
from torch import Tensor

from sd.checkpoints.errors import CheckpointError, damaged
from sd.checkpoints.files import Opened
from sd.checkpoints.layouts import PREFIXES, has_three_parts, refuse_other_families
from sd.config import Config, TextConfig, UNetConfig, VAEConfig

_MOST_TENSORS = 20_000  # of one configuration; SD 1.5 has 1,130


def config_of(opened: Opened) -> Config:
    """The configuration in the metadata, else as `infer_config` tells it, with no number that no model has."""
    if is_own(opened.metadata.get("config")):
        with damaged("the configuration in its metadata is bad"):
            config = Config.from_json(opened.metadata["config"])
            _check_config(config, len(opened.tensors))
    else:
        with damaged("not the layout of Stable Diffusion 1.x"):
            config = replace(infer_config(opened.tensors), prediction=_prediction(opened))
            _check_config(config, len(opened.tensors))
    return config


def _prediction(opened: Opened) -> str:
    """By the marker that trainers put among the tensors, or Stability's metadata; else noise."""
    said = opened.metadata.get("modelspec.prediction_type", "").lower()
    return "v" if "v_pred" in opened.tensors or said in ("v", "v_prediction", "v-prediction") else "eps"


def is_own(config: str | None) -> bool:
    """Whether a `config` in the metadata is meant for this program: others write there what they like."""
    try:
        found = json.loads(config or "null")
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"text", "unet", "vae"} <= found.keys()


def infer_config(state_dict: dict[str, Tensor]) -> Config:
    """Tell the configuration from the tensors' shapes.

    What shapes cannot say is SD 1's: 8 UNet heads, 32 norm groups, text heads of 64, scale factor 0.18215, pictures of
    512. Raises CheckpointError for another family of models, named, and for missing tensors.
    """
    if not has_three_parts(state_dict):
        refuse_other_families(state_dict)
    shapes = _Shapes(state_dict)
    return Config(
        text=_infer_text(shapes.under(PREFIXES["clip"])),
        unet=_infer_unet(shapes.under(PREFIXES["unet"])),
        vae=_infer_vae(shapes.under(PREFIXES["vae"])),
        name="Stable Diffusion 1.x",
    )


def _check_config(config: Config, tensors: int) -> None:
    """Refuse numbers that no model has, before anything is built from them."""
    text, unet, vae = config.text, config.unet, config.vae
    if not all(_positive(part) for part in (text, unet, vae)) or config.image_size < 1:
        raise CheckpointError("its configuration has a number that is not positive")
    if (least := _fewest_tensors(config)) > min(tensors, _MOST_TENSORS):
        raise CheckpointError(f"its configuration needs over {least} tensors; the file has {tensors}")
    _check_parts_agree(text, unet, vae)
    if text.width % text.heads or any(unet.model_channels * m % unet.num_heads for m in unet.channel_mult):
        raise CheckpointError("its configuration has widths that are not a multiple of the attention heads")


def _check_parts_agree(text: TextConfig, unet: UNetConfig, vae: VAEConfig) -> None:
    if unet.in_channels != vae.z_channels and not unet.inpaints:
        kind = {8: "an image-editing model"}.get(unet.in_channels, "another kind of model")
        raise CheckpointError(f"{kind} ({unet.in_channels} input channels); a text-to-image one is needed")
    if unet.context_dim != text.width:
        kind = "Stable Diffusion 2" if unet.context_dim == 1024 else "not Stable Diffusion 1.x"
        raise CheckpointError(f"{kind} (context of {unet.context_dim}, text encoder of {text.width})")


def _positive(part: TextConfig | UNetConfig | VAEConfig) -> bool:
    for name, value in vars(part).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if name != "attention_levels" and not (numbers and all(number > 0 for number in numbers)):
            return False
    return True


def _fewest_tensors(config: Config) -> int:
    """A lower bound of the tensors that the configuration has, counted without building it."""
    unet, vae = config.unet, config.vae
    blocks = 2 * unet.num_res_blocks + 1
    attention = 1 + blocks * len(set(unet.attention_levels) & set(range(len(unet.channel_mult))))
    transformers = 20 * unet.transformer_depth * attention
    residuals = 10 * blocks * len(unet.channel_mult) + 8 * (2 * vae.num_res_blocks + 1) * len(vae.ch_mult)
    return 16 * config.text.layers + transformers + residuals


class _Shapes:
    """Shapes by name under one prefix."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str = ""):
        self.tensors = tensors
        self.prefix = prefix

    def under(self, prefix: str) -> "_Shapes":
        inner = {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}
        return _Shapes(inner, self.prefix + prefix)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> torch.Size:
        if name not in self.tensors:
            raise CheckpointError(f"not a whole Stable Diffusion 1.x checkpoint: it lacks {self.prefix}{name}")
        return self.tensors[name].shape

    def count(self, prefix: str) -> int:
        """How many modules are in the list of this name: `encoder.layers.` -> 12."""
        return len({name[len(prefix) :].split(".")[0] for name in self.tensors if name.startswith(prefix)})


def _infer_text(shapes: _Shapes) -> TextConfig:
    vocab_size, width = shapes["embeddings.token_embedding.weight"]
    if "embeddings.token_embedding.ids" in shapes:
        vocab_size = TextConfig.vocab_size
    return TextConfig(
        vocab_size=vocab_size,
        width=width,
        layers=shapes.count("encoder.layers."),
        heads=max(1, width // 64),
        max_length=shapes["embeddings.position_embedding.weight"][0],
    )


def _infer_unet(shapes: _Shapes) -> UNetConfig:
    model_channels, in_channels = shapes["input_blocks.0.0.weight"][:2]
    levels = _unet_levels(shapes)
    return UNetConfig(
        in_channels=in_channels,
        out_channels=shapes["out.2.weight"][0],
        model_channels=model_channels,
        channel_mult=tuple(
            shapes[f"input_blocks.{level[0]}.0.out_layers.3.weight"][0] // model_channels for level in levels
        ),
        num_res_blocks=len(levels[0]),
        attention_levels=tuple(
            i for i, level in enumerate(levels) if f"input_blocks.{level[0]}.1.norm.weight" in shapes
        ),
        transformer_depth=shapes.count("middle_block.1.transformer_blocks."),
        context_dim=shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
    )


def _unet_levels(shapes: _Shapes) -> list[list[int]]:
    """The numbers of each level's residual blocks among the input blocks; a downsampling begins a new level."""
    levels: list[list[int]] = [[]]
    for block in range(1, shapes.count("input_blocks.")):
        if f"input_blocks.{block}.0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append(block)
    return levels


def _infer_vae(shapes: _Shapes) -> VAEConfig:
    ch, in_channels = shapes["encoder.conv_in.weight"][:2]
    levels = range(shapes.count("encoder.down."))
    return VAEConfig(
        in_channels=in_channels,
        ch=ch,
        ch_mult=tuple(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] // ch for level in levels),
        num_res_blocks=shapes.count("encoder.down.0.block."),
        z_channels=shapes["post_quant_conv.weight"][0],
    )

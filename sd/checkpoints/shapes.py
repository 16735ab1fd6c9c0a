"""Which configuration a checkpoint has: from its metadata, else from the tensors' shapes."""

import json
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from sd.checkpoints.errors import CheckpointError, damaged
from sd.checkpoints.files import Opened
from sd.checkpoints.layouts import PREFIXES, has_three_parts, refuse_other_families
from sd.config import Config, TextConfig, UNetConfig, VAEConfig

_MOST_TENSORS = 20_000  # of one configuration; SD 1.5 has 1,130


def config_of(opened: Opened, prediction: str | None = None) -> Config:
    """The configuration that the file says, else as `infer_config` tells it, with no number that no model has.

    prediction: what the UNet predicts, whatever the file says; None asks it, and guesses where `is_guess`.
    """
    config = _said_config(opened)
    if config is None:
        with damaged("not the layout of Stable Diffusion 1.x"):
            config = infer_config(opened.tensors, opened.marks)
            check_config(config, len(opened.tensors))
            guess = prediction or _said(opened) or _guessed(opened.tensors, config)
        return replace(config, prediction=guess, image_size=768 if config.text.openclip and guess == "v" else 512)
    return replace(config, prediction=prediction or config.prediction)


def _said_config(opened: Opened) -> Config | None:
    """That of a folder, or of this program's metadata."""
    with damaged("the configuration in its metadata is bad"):
        if is_own(opened.metadata.get("config")):
            config = Config.from_json(opened.metadata["config"])
        elif opened.config:
            config = opened.config
        else:
            return None
        check_config(config, len(opened.tensors))
    return config


def _said(opened: Opened) -> str | None:
    """By the marker that trainers put among the tensors, or Stability's metadata."""
    said = opened.metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" in opened.tensors or said in ("v", "v_prediction", "v-prediction"):
        return "v"
    return "eps" if said in ("eps", "epsilon") else None


def is_guess(opened: Opened) -> bool:
    """Whether nothing says what the UNet predicts where both occur: the files of SD 2 do not."""
    with damaged("not the layout of Stable Diffusion 1.x"):
        says = _said_config(opened) or _said(opened)
        return not says and infer_config(opened.tensors, opened.marks).text.openclip


_LAST_NORM = PREFIXES["unet"] + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SPREAD_OF_V = 0.09


def _guessed(tensors: dict[str, Tensor], config: Config) -> str:
    """SD 1 predicts noise, SD 2's files do not say. This bias spreads further where v is predicted: seen in the
    released ones by the authors of ComfyUI, and no more than a guess."""
    if not config.text.openclip:
        return "eps"
    spread = tensors[_LAST_NORM].float().std(correction=0).item() if _LAST_NORM in tensors else 0.0
    return "v" if spread > _SPREAD_OF_V and not config.unet.inpaints else "eps"


def is_own(config: str | None) -> bool:
    """Whether a `config` in the metadata is meant for this program: others write there what they like."""
    try:
        found = json.loads(config or "null")
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"text", "unet", "vae"} <= found.keys()


def infer_config(state_dict: dict[str, Tensor], marks: Collection[str] = ()) -> Config:
    """Tell the configuration from the tensors' shapes, and the family from its layout's marks.

    What shapes cannot say is SD 1's: 8 UNet heads, 32 norm groups, text heads of 64, scale factor 0.18215, pictures of
    512; in SD 2 the UNet's heads are of 64 too. Raises CheckpointError for another family of models, named, and for
    missing tensors.
    """
    if not has_three_parts(state_dict):
        refuse_other_families(state_dict)
    shapes = _Shapes(state_dict)
    openclip = "openclip" in marks
    unet = _infer_unet(shapes.under(PREFIXES["unet"]))
    return Config(
        text=replace(_infer_text(shapes.under(PREFIXES["clip"])), openclip=openclip),
        unet=replace(unet, head_channels=64 if openclip else 0, linear_projections="matrices" in marks),
        vae=_infer_vae(shapes.under(PREFIXES["vae"])),
        name="Stable Diffusion 2.x" if openclip else "Stable Diffusion 1.x",
    )


def check_config(config: Config, tensors: int) -> None:
    """Refuse numbers that no model has, before anything is built from them."""
    text, unet, vae = config.text, config.unet, config.vae
    if not all(_positive(part) for part in (text, unet, vae)) or config.image_size < 1:
        raise CheckpointError("its configuration has a number that is not positive")
    if (least := _fewest_tensors(config)) > min(tensors, _MOST_TENSORS):
        raise CheckpointError(f"its configuration needs over {least} tensors; the file has {tensors}")
    _check_parts_agree(text, unet, vae)
    widths = [unet.model_channels * m for m in unet.channel_mult]
    if text.width % text.heads or any(w % (unet.head_channels or unet.num_heads) for w in widths):
        raise CheckpointError("its configuration has widths that are not a multiple of the attention heads")


_BY_INPUTS = {
    5: "Stable Diffusion 2's depth model",
    7: "Stable Diffusion 2's upscaler",
    8: "instruct-pix2pix, which edits a picture by what a text says",
}


def _check_parts_agree(text: TextConfig, unet: UNetConfig, vae: VAEConfig) -> None:
    if unet.in_channels != vae.z_channels and not unet.inpaints:
        kind = _BY_INPUTS.get(unet.in_channels, "another kind of model")
        needed = "one that draws from text, or an inpainting one, is needed"
        raise CheckpointError(f"{kind} ({unet.in_channels} input channels); {needed}")
    if unet.context_dim != text.width:
        what = f"its UNet attends to a text of {unet.context_dim}, and its text encoder gives one of {text.width}"
        raise CheckpointError(f"parts of two families: {what}")


_MAY_BE_NOTHING = ("attention_levels", "head_channels", "openclip", "linear_projections")


def _positive(part: TextConfig | UNetConfig | VAEConfig) -> bool:
    for name, value in vars(part).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if name not in _MAY_BE_NOTHING and not (numbers and all(number > 0 for number in numbers)):
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

"""The layout of Stable Diffusion 2: OpenCLIP's names for the text encoder, matrices where SD 1 has 1x1 convolutions.

Read, its tensors get the names and shapes of SD 1's layout, as views: the three projections of an attention are parts
of one tensor, and a matrix over positions is a convolution of 1x1. Written, they get their own again.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from sd.checkpoints.layouts import PREFIXES
from sd.config import Config

Tensors = dict[str, Tensor]

OPENCLIP = "cond_stage_model.model."
DEPTH = 24  # of ViT-H; the last layer is not used (Stability's configuration: layer "penultimate")

_ENDS = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


OPENCLIP_MARK = "openclip"
MATRICES_MARK = "matrices"


def marks(tensors: Tensors) -> frozenset[str]:
    """What of this layout a file has, by which the family is told when all have SD 1's names.

    "openclip": the text encoder is OpenCLIP's, and no other is there. "matrices": the UNet's transformers have them.
    """
    other = PREFIXES["clip"] + "embeddings.position_embedding.weight"
    projection = tensors.get(PREFIXES["unet"] + "middle_block.1.proj_in.weight")
    found = {
        OPENCLIP_MARK: f"{OPENCLIP}positional_embedding" in tensors and other not in tensors,
        MATRICES_MARK: projection is not None and projection.ndim == 2,
    }
    return frozenset(mark for mark, there in found.items() if there)


def marks_of(config: Config) -> frozenset[str]:
    """The same of what a model of this configuration is written as."""
    there = {OPENCLIP_MARK: config.text.openclip, MATRICES_MARK: config.unet.linear_projections}
    return frozenset(mark for mark, is_there in there.items() if is_there)


def as_sd1(tensors: Tensors) -> Tensors:
    """By the names of SD 1's layout. What is not used keeps its own: the last layer, text_projection, logit_scale."""
    unused = _unused_layer(tensors)
    renamed = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(OPENCLIP)
        if inner == name or inner.startswith(unused):
            renamed[name] = tensor
        else:
            renamed |= dict(_renamed(inner, tensor)) or {name: tensor}
    return renamed


def _unused_layer(tensors: Tensors) -> str:
    """How the names of the last layer begin. Files that were made from diffusers' lack it, and text_projection too."""
    numbered = (re.match(r"cond_stage_model\.model\.transformer\.resblocks\.(\d+)\.", name) for name in tensors)
    count = max((int(match[1]) for match in numbered if match), default=0) + 1
    whole = count == DEPTH or f"{OPENCLIP}text_projection" in tensors
    return f"transformer.resblocks.{count - 1 if whole else count}."


def _renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name in _ENDS:
        yield PREFIXES["clip"] + _ENDS[name], tensor
    if not (match := _LAYER.fullmatch(name)):
        return
    number, layer, kind = match.groups()
    stem = f"{PREFIXES['clip']}encoder.layers.{number}."
    if layer == "attn.in_proj" and tensor.ndim and len(tensor) % 3 == 0:
        for projection, part in zip(_PROJECTIONS, tensor.chunk(3), strict=True):
            yield f"{stem}self_attn.{projection}.{kind}", part
    elif layer in _LAYERS:
        yield f"{stem}{_LAYERS[layer]}.{kind}", tensor


_MATRICES = re.compile(
    r".*\.proj_(in|out)\.weight|model_ema\..*proj_(in|out)weight|.*\.mid\.attn_1\.(q|k|v|proj_out)\.weight"
)


def as_convolutions(tensors: Tensors) -> Tensors:
    """Matrices [O, I] that SD 1's layout has as convolutions [O, I, 1, 1]."""
    return {
        name: t[:, :, None, None] if t.ndim == 2 and _MATRICES.fullmatch(name) else t for name, t in tensors.items()
    }


def as_stored(tensors: Tensors, config: Config) -> Tensors:
    """The names and shapes of the file that a model of this configuration is written to."""
    if config.unet.linear_projections:
        unet = PREFIXES["unet"]
        tensors = {n: t[:, :, 0, 0] if n.startswith(unet) and _MATRICES.fullmatch(n) else t for n, t in tensors.items()}
    return _as_openclip(tensors) if config.text.openclip else tensors


def _as_openclip(tensors: Tensors) -> Tensors:
    ends, layers = ({new: old for old, new in names.items()} for names in (_ENDS, _LAYERS))
    written: Tensors = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(PREFIXES["clip"])
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", inner)
        if inner in ends:
            written[OPENCLIP + ends[inner]] = tensor
        elif not match or inner == name:
            written[name] = tensor
        else:
            number, layer, kind = match.groups()
            stem = f"{OPENCLIP}transformer.resblocks.{number}."
            if layer in layers:
                written[f"{stem}{layers[layer]}.{kind}"] = tensor
            elif layer.endswith("q_proj"):
                parts = [tensors[name.replace("q_proj", projection)] for projection in _PROJECTIONS]
                written[f"{stem}attn.in_proj_{kind}"] = torch.cat(parts)
    return written

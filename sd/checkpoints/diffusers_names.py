"""What diffusers and transformers call the tensors of these models: our names -> theirs."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from torch import nn

from sd.clip import CLIP
from sd.unet import Downsample, ResBlock, SpatialTransformer, UNet, Upsample
from sd.vae import VAE

_IN_BLOCKS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "op": "conv",
}
WAY_DOWN = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
}
_UNET = {**WAY_DOWN, "out.0": "conv_norm_out", "out.2": "conv_out"}


def diffusers_blocks(unet: nn.Module) -> Iterator[tuple[str, str]]:
    """Our path of each residual block, transformer and change of size -> diffusers'. A ControlNet has no way up."""
    kinds = {ResBlock: "resnets", SpatialTransformer: "attentions", Downsample: "downsamplers", Upsample: "upsamplers"}
    for side, stem in (("input_blocks", "down_blocks"), ("output_blocks", "up_blocks")):
        level, counts = 0, {}
        for i, block in enumerate(getattr(unet, side, ())):
            for j, layer in enumerate(block):
                kind = next((name for plain, name in kinds.items() if isinstance(layer, plain)), None)
                if kind is None:
                    continue
                number = counts.setdefault((level, kind), 0)
                counts[level, kind] += 1
                yield f"{side}.{i}.{j}", f"{stem}.{level}.{kind}.{number}"
            # A level ends with its change of size; the last one has none.
            level += isinstance(block[-1], Downsample | Upsample)
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.1", "mid_block.attentions.0"
    yield "middle_block.2", "mid_block.resnets.1"


def their_paths(net: nn.Module, paths: Iterable[str], others: dict[str, str]) -> Iterator[str]:
    """Of layers of a UNet or ControlNet; others: those that are in no block."""
    blocks = dict(diffusers_blocks(net))
    for path in paths:
        block = next((block for block in blocks if path.startswith(f"{block}.")), None)
        if block is None:
            yield others[path]
        else:
            layer = path[len(block) + 1 :]
            yield f"{blocks[block]}.{_IN_BLOCKS.get(layer, layer)}"


def unet_paths(unet: UNet, paths: Iterable[str]) -> Iterator[str]:
    return their_paths(unet, paths, _UNET)


def unet_names(unet: UNet) -> dict[str, str]:
    return names_by_path(unet, partial(unet_paths, unet))


def names_by_path(model: nn.Module, spelled: Callable[[Iterable[str]], Iterable[str]]) -> dict[str, str]:
    """Of each tensor, from what a layer's path becomes."""
    names = [name.rpartition(".") for name in model.state_dict()]
    theirs = spelled(path for path, _, _ in names)
    return {f"{path}.{kind}": f"{their}.{kind}" for (path, _, kind), their in zip(names, theirs, strict=True)}


def text_names(clip: CLIP) -> dict[str, str]:
    return {name: f"text_model.{name}" for name in clip.state_dict()}


_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers called the autoencoder's attention until 2023; most files have these names."""


def vae_names(vae: VAE) -> dict[str, str]:
    """Diffusers numbers the decoder's levels in the order in which they run."""
    return {name: _vae_name(name, len(vae.decoder.up)) for name in vae.state_dict()}


def _vae_name(name: str, levels: int) -> str:
    side, *rest = name.split(".")
    match rest:
        case [("down" | "up") as way, level, ("downsample" | "upsample") as change, *inner]:
            return ".".join([side, f"{way}_blocks", _level(way, level, levels), f"{change}rs.0", *inner])
        case [("down" | "up") as way, level, "block", number, *inner]:
            resnet = [f"{way}_blocks", _level(way, level, levels), "resnets", number]
            return ".".join([side, *resnet, *_shortcut(inner)])
        case ["mid", "attn_1", layer, kind]:
            return f"{side}.mid_block.attentions.0.{_ATTENTION[layer]}.{kind}"
        case ["mid", ("block_1" | "block_2") as block, *inner]:
            return ".".join([side, "mid_block", "resnets", str(int(block[-1]) - 1), *_shortcut(inner)])
        case ["norm_out", kind]:
            return f"{side}.conv_norm_out.{kind}"
    return name


def _level(way: str, level: str, levels: int) -> str:
    return level if way == "down" else str(levels - 1 - int(level))


def _shortcut(inner: list[str]) -> list[str]:
    return ["conv_shortcut" if part == "nin_shortcut" else part for part in inner]


def of_today(name: str) -> str:
    """A tensor's name in an older file, as it is called now."""
    stem, _, kind = name.rpartition(".")
    block, _, layer = stem.rpartition(".")
    if block.endswith("mid_block.attentions.0") and layer in _OLD_ATTENTION:
        return f"{block}.{_OLD_ATTENTION[layer]}.{kind}"
    return name

"""Files of LoRAs and their kin: what each changes, however its layers are called.

    kohya      lora_unet_down_blocks_0_attentions_0_..._to_q.lora_down.weight, alpha; lora_te_*; convolutions, lora_mid
               (LoCon), hada_* (LoHa), lokr_* (LoKr), dora_scale (DoRA); also by the original names (input_blocks_1_1_)
    diffusers  unet.down_blocks.0....to_q.lora_A.weight (PEFT), .lora.down.weight, .processor.to_q_lora.down.weight
    first      unet:0:up, text_encoder:0:down: the layers by number, and learned words beside them (cloneofsimo/lora)

A change is to one weight [O, I] or [O, I, kh, kw]. Everything of a file is either used or named.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sd.checkpoints.diffusers_names import unet_paths
from sd.checkpoints.embedding import vectors_of
from sd.checkpoints.errors import CheckpointError, StrPath, naming, some
from sd.checkpoints.files import check_size, open_checkpoint
from sd.checkpoints.layouts import BY_TEXT_WIDTH
from sd.clip import CLIP
from sd.unet import BasicTransformerBlock, UNet

Layer = tuple[str, str]
"""A part, "unet" or "clip", and the path of a layer in it."""

Tensors = dict[str, Tensor]

# ---- what changes a weight


@dataclass(frozen=True)
class Change:
    """The tensors of one layer, by their short names: up, down, mid, alpha, hada_w1_a, lokr_w2, dora_scale, ..."""

    tensors: Tensors

    def check(self, shape: torch.Size) -> None:
        """Raises CheckpointError unless it is a change of a weight of this shape; computes nothing."""
        magnitude = self.tensors.get("dora_scale")
        try:
            Change({name: tensor.to("meta") for name, tensor in self.tensors.items()})._delta().reshape(shape)
            fits = magnitude is None or magnitude.numel() in shape[:2]
        except (RuntimeError, IndexError):  # IndexError: of a tensor without axes
            fits = False
        if not fits:
            shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in self.tensors.items() if name != "alpha")
            raise CheckpointError(f"{shapes} do not fit a weight of {tuple(shape)}")

    def applied(self, weight: Tensor, strength: float) -> Tensor:
        """The weight, in fp32, with this change at a strength."""
        delta = (self._delta() * self._scale()).reshape(weight.shape).to(weight.device)
        scale = self.tensors.get("dora_scale")
        return weight + strength * delta if scale is None else _decomposed(weight, strength * delta, scale.to(delta))

    def _scale(self) -> float:
        alpha, rank = self.tensors.get("alpha"), self._rank()
        return alpha.item() / rank if alpha is not None and rank else 1.0

    def _rank(self) -> int | None:
        """None where both factors are whole, and alpha says nothing (LoKr)."""
        for name, axis in (("down", 0), ("hada_w1_b", 0), ("lokr_w1_b", 0), ("lokr_w2_b", 0)):
            if name in self.tensors:
                return self.tensors[name].shape[axis]
        return None

    def _delta(self) -> Tensor:
        t = {name: tensor.float() for name, tensor in self.tensors.items()}
        if "up" in t and "mid" in t:
            return torch.einsum("or,rshw,si->oihw", t["up"].flatten(1), t["mid"], t["down"].flatten(1))
        if "up" in t:
            return t["up"].flatten(1) @ t["down"].flatten(1)
        if "hada_w1_a" in t:
            return _factor(t, "hada_w1", "hada_t1") * _factor(t, "hada_w2", "hada_t2")
        if "lokr_w1" in t or "lokr_w1_a" in t:
            return _kronecker(_factor(t, "lokr_w1", ""), _factor(t, "lokr_w2", "lokr_t2"))
        return t["diff"]


def _factor(t: Tensors, name: str, core: str) -> Tensor:
    """A matrix, or the product of two, or of two and a small kernel between them (Tucker)."""
    if name in t:
        return t[name]
    a, b = t[f"{name}_a"], t[f"{name}_b"]
    if core in t:
        # LoHa holds the first factor [r, O], LoKr as well.
        return torch.einsum("rshw,si,ro->oihw", t[core], b.flatten(1), a.flatten(1))
    return a @ b.flatten(1)


def _kronecker(w1: Tensor, w2: Tensor) -> Tensor:
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)) if w2.ndim > 2 else w1, w2)


def _decomposed(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA (Liu et al. 2024): the direction of weight + delta, of a learned length a row, or a column."""
    moved = weight + delta
    rows = magnitude.numel() == weight.shape[0] and (magnitude.ndim == 1 or magnitude.shape[0] == weight.shape[0])
    axes = tuple(axis for axis in range(weight.ndim) if axis != (0 if rows else 1))
    shape = [-1 if axis == (0 if rows else 1) else 1 for axis in range(weight.ndim)]
    return moved * (magnitude.reshape(shape) / torch.linalg.vector_norm(moved, dim=axes, keepdim=True))


# ---- a file


@dataclass(frozen=True)
class Adapter:
    """What a file changes, learned words beside it, its metadata, and the keys that fit nothing here."""

    changes: Mapping[Layer, Change]
    words: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    unknown: tuple[str, ...] = field(default=())

    def triggers(self) -> list[str]:
        return triggers(self.metadata)


def triggers(metadata: Mapping[str, str]) -> list[str]:
    """The words that its training saw most, as kohya's trainer records them; best first, twelve at most."""
    found = re.findall(r'"([^"]+)": *(\d+)', metadata.get("ss_tag_frequency", ""))
    return [word for word, _ in sorted(found, key=lambda pair: -int(pair[1]))[:12]]


_SHORT = {"lora_down": "down", "lora_up": "up", "lora_mid": "mid", "lora_A": "down", "lora_B": "up"}
_KEYS = (
    r"(?P<layer>.+)\.(?P<name>lora_(?:down|up|mid|A|B))(?:\.default)?(?:\.weight)?",
    r"(?P<layer>.+)\.(?:lora|lora_linear_layer)\.(?P<name>down|up)\.weight",
    r"(?P<layer>.+)\.processor(?P<of>\.to_(?:q|k|v|out))_lora\.(?P<name>down|up)\.weight",
    r"(?P<layer>.+)\.(?P<name>alpha|dora_scale|diff|hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?)",
    r"(?P<layer>.+)\.(?P<name>lora_magnitude_vector)(?:\.default)?(?:\.weight)?",
    r"(?P<layer>(?:unet|text_encoder):\d+):(?P<name>up|down)",
)
_OF_OTHERS = (
    (
        r"lora_te[12]_|lora_unet_(down_blocks_\d+|input_blocks_\d+_\d+)_.*transformer_blocks_[2-9]",
        "Stable Diffusion XL",
    ),
    (r"(lora_transformer_|transformer\.|lora_unet_)(single|double)_(blocks|transformer)", "Flux"),
    (r"lora_unet_joint_blocks|transformer\.transformer_blocks", "Stable Diffusion 3"),
)


def read_lora(path: StrPath, unet: UNet, clip: CLIP) -> Adapter:
    """What a file changes in these models. Runs nothing that is in it.

    Raises CheckpointError if it is no such file, is damaged, holds other than finite numbers, or is for another family.
    """
    with naming(path):
        opened = open_checkpoint(Path(path))
        check_size(opened.tensors.values(), opened.size)
        return _adapter(opened.tensors, opened.metadata, unet, clip)


def _adapter(tensors: Tensors, metadata: Mapping[str, str], unet: UNet, clip: CLIP) -> Adapter:
    words = {key: tensor for key, tensor in tensors.items() if re.fullmatch(r"<[^>]+>", key) and tensor.ndim <= 2}
    grouped, unknown = lora_groups({key: t for key, t in tensors.items() if key not in words})
    if not grouped:
        raise CheckpointError(f"holds no LoRA: {some(tensors) or 'it is empty'}")
    if other := family_of_lora(grouped):
        raise CheckpointError(f"a LoRA for {other}; one for this model is needed")
    layers, changes = layer_names(unet, clip), {}
    for name, own in grouped.items():
        layer = layers.get(name)
        if layer is None:
            unknown += [f"{name}.{short}" for short in own]
        else:
            changes[layer] = Change(_checked(name, own))
    if not changes:
        raise CheckpointError(f"changes no layer of this model: {some(grouped)}")
    _check_shapes(changes, {"unet": unet, "clip": clip})
    width = clip.embeddings.token_embedding.embedding_dim
    words = {word: vectors_of(word, tensor, width) for word, tensor in words.items()}
    return Adapter(changes, words, metadata, tuple(unknown))


def family_of_lora(layers: Iterable[str]) -> str | None:
    """The family that layers of these names belong to, if that is none of ours as far as they tell."""
    layers = list(layers)
    return next((family for pattern, family in _OF_OTHERS if any(re.match(pattern, key) for key in layers)), None)


def lora_groups(tensors: Tensors) -> tuple[dict[str, Tensors], list[str]]:
    """The tensors of each layer by the name that the file has for it, and the keys that are of no known form."""
    grouped: dict[str, Tensors] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        match = next(filter(None, (re.fullmatch(pattern, key) for pattern in _KEYS)), None)
        if match is None:
            unknown.append(key)
            continue
        found = match.groupdict()
        layer = found["layer"] + (found.get("of") or "")
        name = _SHORT.get(found["name"], found["name"]).replace("lora_magnitude_vector", "dora_scale")
        grouped.setdefault(layer.removeprefix("base_model.model."), {})[name] = tensor
    return grouped, unknown


_WHOLE = (("up", "down"), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("diff",))


def _checked(name: str, own: Tensors) -> Tensors:
    """A layer's tensors, if they are a whole change of plain finite numbers."""
    lokr = all(f"lokr_w{i}" in own or {f"lokr_w{i}_a", f"lokr_w{i}_b"} <= own.keys() for i in (1, 2))
    if not lokr and not any(set(names) <= own.keys() for names in _WHOLE):
        raise CheckpointError(f"{name} has {some(own)} alone: a part is missing")
    for short, tensor in own.items():
        if tensor.layout != torch.strided or not (tensor.is_floating_point() or short == "alpha"):
            raise CheckpointError(f"{name}.{short} is not a plain tensor of floating-point numbers")
        if short == "alpha" and tensor.numel() != 1:
            raise CheckpointError(f"{name}.alpha is {tuple(tensor.shape)}, not one number")
        if tensor.numel() == 0 or not tensor.float().isfinite().all():
            raise CheckpointError(f"{name}.{short} is empty, or holds NaN or infinite numbers")
    return own


def _check_shapes(changes: Mapping[Layer, Change], models: Mapping[str, nn.Module]) -> None:
    for (part, path), change in changes.items():
        weight = models[part].get_submodule(path).weight
        try:
            change.check(weight.shape)
        except CheckpointError as error:
            down = change.tensors.get("down")
            of_text = down is not None and path.endswith(("attn2.to_k", "attn2.to_v"))
            family = BY_TEXT_WIDTH.get(down.shape[1]) if of_text else None
            hint = f"; it is for {family}" if family else ""
            raise CheckpointError(f"{part}.{path}: {error}{hint}") from None


# ---- what layers are called


def layer_names(unet: UNet, clip: CLIP) -> dict[str, Layer]:
    """Every name that a file may have for a layer with a weight of two axes or more."""
    names: dict[str, Layer] = {}
    for path, other in diffusers_paths(unet).items():
        layer = ("unet", path)
        for dotted in (other, path):
            # In diffusers' files of attention processors the last layer of an attention is to_out, elsewhere to_out.0.
            for spelled in {dotted, dotted.removesuffix(".0") if dotted.endswith("to_out.0") else dotted}:
                names |= {spelled: layer, f"unet.{spelled}": layer, f"lora_unet_{spelled.replace('.', '_')}": layer}
    for path in _weighted(clip):
        layer = ("clip", path)
        for dotted in (f"text_model.{path}", path):
            names |= {f"text_encoder.{dotted}": layer, f"lora_te_{dotted.replace('.', '_')}": layer}
    names |= {f"unet:{i}": ("unet", path) for i, path in enumerate(_first_order(unet))}
    attentions = [path for path in _weighted(clip) if ".self_attn." in path]
    return names | {f"text_encoder:{i}": ("clip", path) for i, path in enumerate(_sorted_text(attentions))}


def _weighted(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if getattr(m, "weight", None) is not None and m.weight.ndim >= 2]


def diffusers_paths(unet: UNet) -> dict[str, str]:
    """Our path of each layer with a weight of two axes or more -> diffusers'."""
    paths = _weighted(unet)
    return dict(zip(paths, unet_paths(unet, paths), strict=True))


def _first_order(unet: UNet) -> list[str]:
    """The layers in the order in which the first published files number them: down, up, middle; a block's attention to
    itself, its GEGLU, its attention to the text."""
    order = {"input_blocks": 0, "output_blocks": 1, "middle_block": 2}
    blocks = [name for name, module in unet.named_modules() if isinstance(module, BasicTransformerBlock)]
    blocks.sort(key=lambda name: order[name.partition(".")[0]])
    heads = ("to_q", "to_k", "to_v", "to_out.0")
    inner = [*(f"attn1.{h}" for h in heads), "ff.net.0.proj", *(f"attn2.{h}" for h in heads)]
    return [f"{block}.{layer}" for block in blocks for layer in inner]


def _sorted_text(paths: list[str]) -> list[str]:
    """As transformers' attention has them: k, v, q, out."""
    order = {"k_proj": 0, "v_proj": 1, "q_proj": 2, "out_proj": 3}
    layer = lambda path: int(re.search(r"layers\.(\d+)\.", path)[1])  # noqa: E731
    return sorted(paths, key=lambda path: (layer(path), order[path.rpartition(".")[2]]))

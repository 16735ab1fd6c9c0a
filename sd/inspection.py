"""What a file is, and how to use it: `python sd/inference.py --inspect FILE`. Nothing in it runs, nothing is computed.

Told by the names and shapes of its tensors: a checkpoint, a LoRA, a ControlNet, learned words, TAESD, a quantized UNet,
or a model of another kind, by its name. Weights are mapped, not read: it takes a moment, however large the file is.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sd.checkpoints.embedding import read_embeddings
from sd.checkpoints.errors import CheckpointError, naming, some
from sd.checkpoints.files import Opened
from sd.checkpoints.layouts import (
    BY_TEXT_WIDTH,
    PREFIXES,
    TOKEN_IDS,
    has_three_parts,
    refuse_other_families,
    unusual,
)
from sd.checkpoints.lora import family_of_lora, lora_groups, triggers
from sd.checkpoints.shapes import config_of, is_guess
from sd.checkpoints.whole import open_model
from sd.models import build

OURS = ("Stable Diffusion 1.x", "Stable Diffusion 2.x")

Lines = Iterator[tuple[str, str]]
"""A name and what is said under it."""


def inspect(path: str | os.PathLike) -> str:
    """What is to be told of a file, a line each: `kind`, what it holds, `use`.

    Raises CheckpointError, in one line, for what is no file of weights at all, or is damaged.
    """
    with naming(path):
        opened = open_model(Path(path))
        told = next(filter(None, (look(opened, str(path)) for look in _LOOKS)), None)
        lines = list(told or _other(opened, str(path)))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {_printable(text)}" for name, text in lines)


def _printable(text: str) -> str:
    """Names come from the file: no terminal codes, no megabytes."""
    return "".join(c if c.isprintable() else " " for c in text)[:600]


# ---- each kind: None where it is another


def _checkpoint(opened: Opened, path: str) -> Lines | None:
    return _of_checkpoint(opened, path) if has_three_parts(opened.tensors) else None


def _of_checkpoint(opened: Opened, path: str) -> Lines:
    config = config_of(opened)
    with torch.device("meta"):
        models = dict(zip(PREFIXES, build(config), strict=True))
    wanted = {PREFIXES[part] + name: t for part, model in models.items() for name, t in model.state_dict().items()}
    kind = "an inpainting model" if config.unet.inpaints else "a checkpoint"
    yield "kind", f"{kind} of {config.name}: text encoder, UNet and VAE"
    said = f"{config.prediction} ({'the noise' if config.prediction == 'eps' else 'velocity'})"
    yield "prediction", f"{said}, guessed: --prediction eps or v decides" if is_guess(opened) else said
    yield from _numbers({name: t for name, t in opened.tensors.items() if name in wanted})
    if any(name.startswith("model_ema.") for name in opened.tensors):
        yield "averaged", "a second UNet of averaged weights (model_ema.*): --ema takes it"
    missing = [name for name in wanted if name not in opened.tensors]
    yield "missing", some(missing) or "nothing"
    yield "left over", some(unusual(opened.tensors.keys() - {*wanted, TOKEN_IDS})) or "nothing unusual"
    yield "use", f"--ckpt {path}" + (" --init-image PICTURE --mask MASK" if config.unet.inpaints else "")


def _lora(opened: Opened, path: str) -> Lines | None:
    grouped, unknown = lora_groups(opened.tensors)
    return _of_lora(grouped, unknown, opened, path) if grouped else None


def _of_lora(grouped: Mapping[str, dict[str, Tensor]], unknown: Sequence[str], opened: Opened, path: str) -> Lines:
    kinds = Counter(_lora_kind(own) for own in grouped.values())
    family = family_of_lora(grouped) or _lora_width(grouped) or "Stable Diffusion 1.x"
    yield "kind", f"{' and '.join(kinds)} for {family}"
    parts = Counter("text encoder" if re.match(r"lora_te|text_encoder", name) else "UNet" for name in grouped)
    yield "changes", ", ".join(f"{count} layers of the {part}" for part, count in parts.items())
    ranks = sorted({own["down"].shape[0] for own in grouped.values() if "down" in own and own["down"].ndim})
    if ranks:
        yield "rank", str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    yield from _numbers(opened.tensors)
    words = [name for name in opened.tensors if re.fullmatch(r"<[^>]+>", name)]
    if words:
        yield "words", ", ".join(words)
    if said := triggers(opened.metadata):
        yield "triggers", ", ".join(said)
    yield "left over", some(name for name in unknown if name not in words) or "nothing"
    yield "use", _beside(family, f"--lora {path} or --lora {path}:0.8")


def _beside(family: str, use: str) -> str:
    """How to use what changes a model, or that its family is none of ours."""
    if family not in OURS:
        return f"not here: it is for {family}"
    return use if family == OURS[0] else f"{use}, beside a --ckpt of {family}"


def _lora_kind(own: Mapping[str, Tensor]) -> str:
    if "dora_scale" in own:
        return "a DoRA"
    if any(name.startswith("hada") for name in own):
        return "a LoHa"
    return "a LoKr" if any(name.startswith("lokr") for name in own) else "a LoRA"


def _lora_width(grouped: Mapping[str, dict[str, Tensor]]) -> str | None:
    """By the width of the text that a UNet's layers attend to."""
    downs = (own.get("down") for name, own in grouped.items() if re.search(r"attn2.to_[kv]$", name))
    inner = (down.shape[1] for down in downs if down is not None and down.ndim > 1)
    return next((BY_TEXT_WIDTH[width] for width in inner if width in BY_TEXT_WIDTH), None)


_HINT = re.compile(r"(control_model\.)?input_hint_block\.0\.weight|controlnet_cond_embedding\.conv_in\.weight")


def _control(opened: Opened, path: str) -> Lines | None:
    return _of_control(opened, path) if any(map(_HINT.fullmatch, opened.tensors)) else None


def _of_control(opened: Opened, path: str) -> Lines:
    layout = "diffusers'" if any(name.startswith("controlnet_") for name in opened.tensors) else "the original"
    keys = (t for name, t in opened.tensors.items() if name.endswith("attn2.to_k.weight"))
    text = next((t.shape[1] for t in keys if t.ndim > 1), 768)
    family = BY_TEXT_WIDTH.get(text, OURS[0])
    yield "kind", f"a ControlNet for {family}, {layout} layout"
    if "difference" in opened.tensors:
        yield "weights", "differences to those of Stable Diffusion 1.5"
    yield from _numbers(opened.tensors)
    yield "use", _beside(family, f"--control {path}:PICTURE")


def _taesd(opened: Opened, path: str) -> Lines | None:
    own = {"1.weight", "3.conv.0.weight", "19.weight"} <= opened.tensors.keys()
    if not own and "decoder.layers.2.conv.0.weight" not in opened.tensors:
        return None
    return iter(
        (("kind", "TAESD's decoder"), *_numbers(opened.tensors), ("use", f"--preview 5 --preview-decoder {path}"))
    )


def _quantized(opened: Opened, path: str) -> Lines | None:
    if "quantization" not in opened.metadata:
        return None
    return iter((("kind", "a quantized UNet of this program"), ("use", f"--load-quantized {path} beside --ckpt")))


def _embedding(opened: Opened, path: str) -> Lines | None:
    for width in _WORD_WIDTHS:
        try:
            return _of_words(read_embeddings(path, width), BY_TEXT_WIDTH[width], path)
        except CheckpointError as error:
            # One for another width is told by the error, without the path that comes before it.
            said, wide = str(error)[len(path) + 2 :], "vectors of" in str(error) or "clip_g" in str(error)
    return iter((("kind", "learned words"), ("use", f"not here: {said}"))) if wide else None


_WORD_WIDTHS = (1024, 768)


def _of_words(words: Mapping[str, Tensor], family: str, path: str) -> Lines:
    yield "kind", f"learned words (textual inversion) for {family}"
    yield "words", ", ".join(f"{word} ({len(vectors)} vectors)" for word, vectors in words.items())
    yield "use", _beside(family, f"--embedding {path}, then the word in a prompt")


def _other(opened: Opened, path: str) -> Lines:
    """Other families by name, parts of ours, or only what is in it."""
    try:
        refuse_other_families(opened.tensors)
        parts = [part for part, prefix in PREFIXES.items() if any(name.startswith(prefix) for name in opened.tensors)]
        kind = f"of Stable Diffusion's parts only {' and '.join(parts)}" if parts else "nothing that is known here"
    except CheckpointError as error:
        kind = str(error).partition(";")[0].removeprefix("this is ")
    yield "kind", kind
    yield from _numbers(opened.tensors)
    yield "tensors", some(opened.tensors)
    yield "use", "not here (docs/files.md lists what opens)"


_LOOKS: tuple[Callable[[Opened, str], Lines | None], ...] = (
    _checkpoint,
    _quantized,
    _control,
    _lora,
    _taesd,
    _embedding,
)


def _numbers(tensors: Mapping[str, Tensor]) -> Lines:
    kinds = Counter()
    for tensor in tensors.values():
        kinds[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    shown = ", ".join(f"{count:,} in {kind}" for kind, count in kinds.most_common(3))
    yield "numbers", f"{shown}, in {len(tensors)} tensors"

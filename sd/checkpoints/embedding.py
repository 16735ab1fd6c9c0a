"""Files of learned words (textual inversion), however they are laid out.

    AUTOMATIC1111   a pickle: string_to_param {"*": [n, C]}, name; the first code's string_to_param is a ParameterDict
    diffusers       {word: [C] or [n, C]}, as .bin or .safetensors; trainers of our day write emb_params, or clip_l

What a file holds is used or named.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sd.checkpoints.errors import CheckpointError, StrPath, naming, some
from sd.checkpoints.files import check_size, open_content
from sd.checkpoints.layouts import BY_TEXT_WIDTH

UNNAMED = ("emb_params", "clip_l", "*")
"""Keys that say nothing of the word: then it is called as the file is."""


def read_embeddings(path: StrPath, width: int) -> dict[str, Tensor]:
    """The words of a file and their vectors, [n, width] in fp32. Runs nothing that is in it.

    Raises CheckpointError if it is no such file, is damaged, holds other than finite numbers, or is for another family.
    """
    with naming(path):
        found = _words(open_content(Path(path)), Path(path).stem)
        if not found:
            raise CheckpointError("holds no learned word (textual inversion)")
        check_size(itertools.chain(*found.values()), Path(path).stat().st_size)
        return {word: torch.cat([vectors_of(word, t, width) for t in parts]) for word, parts in found.items()}


def _words(content: object, name: str) -> dict[str, list[Tensor]]:
    """Each word's tensors, as they are in the file: a word's vectors may lie in several."""
    if not isinstance(content, Mapping):
        return {}
    inner = content.get("string_to_param")
    if inner is not None:
        tensors = list(_tensors(getattr(inner, "state", inner)))
        return {name: tensors} if tensors else {}
    if "clip_g" in content:
        raise CheckpointError("a word for Stable Diffusion XL (clip_g); one for this model is needed")
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if many := [key for key in tensors if "." in str(key)]:
        raise CheckpointError(f"holds weights of a model, no learned word: {some(many)}")
    return {name if key in UNNAMED else str(key): [tensor] for key, tensor in tensors.items()}


def _tensors(content: object):
    """Those in dicts in dicts: a ParameterDict keeps its own among its attributes."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors(value)


def vectors_of(word: str, tensor: Tensor, width: int) -> Tensor:
    """A word's vectors, checked: one as [C] or several as [n, C], here [n, width] in fp32. Raises CheckpointError."""
    found = tensor.detach().unsqueeze(0) if tensor.ndim == 1 else tensor.detach()
    if found.ndim != 2 or not found.is_floating_point() or found.layout != torch.strided or not len(found):
        raise CheckpointError(f"{word} is {tuple(tensor.shape)} of {tensor.dtype}, no vectors")
    if found.shape[1] != width:
        family = BY_TEXT_WIDTH.get(found.shape[1])
        hint = f": it is for {family}" if family else ""
        raise CheckpointError(f"{word} has vectors of {found.shape[1]}, and this model's are of {width}{hint}")
    found = found.float().clone()
    if not found.isfinite().all():
        raise CheckpointError(f"{word} holds NaN or infinite numbers")
    return found

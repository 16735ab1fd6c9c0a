"""What `StableDiffusion.generate` is given: checked, and one of each for every picture."""

import math
import operator
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from sd.config import dtype_name
from sd.images import read
from sd.noise import PictureNoise

Number = TypeVar("Number", int, float)


def broadcast(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None, seed: int | Sequence[int] | None
) -> tuple[list[str], list[str], list[int]]:
    """Lists of one length. An integer seed counts up; prompts repeat. Raises ValueError for what is none of these."""
    texts = {"prompt": prompt, "negative_prompt": negative_prompt or ""}
    columns = [_texts(name, value) for name, value in texts.items()]
    seed = seed.tolist() if hasattr(seed, "tolist") else seed  # numpy's and torch's
    given_seeds = [whole("seed", one) for one in _seeds(seed)] if isinstance(seed, Iterable) else None
    seed = seed if seed is None or given_seeds is not None else whole("seed", seed)
    if not columns[0]:
        raise ValueError("generate needs at least one prompt")
    count = max(len(column) for column in (*columns, given_seeds or [0]))
    if given_seeds is None:
        first = secrets.randbelow(2**32) if seed is None else seed
        given_seeds = [first + i for i in range(count)]
    columns = [column * count if len(column) == 1 else column for column in (*columns, given_seeds)]
    if lengths := {len(column) for column in columns} - {count}:
        raise ValueError(f"prompts, negative prompts and seeds differ in number: {count} and {lengths.pop()}")
    if bad := [s for s in columns[2] if not 0 <= s < 2**63]:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, not {bad[0]}")
    return columns[0], columns[1], columns[2]


def _seeds(seed: Iterable) -> Iterable:
    if isinstance(seed, str | bytes):
        raise ValueError(f"seed must be a whole number, not {seed!r}")
    return seed


def _texts(name: str, value: object) -> list[str]:
    found = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    if wrong := [one for one in found if not isinstance(one, str)]:
        raise ValueError(f"{name} must be text, not {type(wrong[0]).__name__}")
    return list(map(str, found))  # numpy's are texts of their own kind


def whole(name: str, value: object) -> int:
    """Any whole number, numpy's too, and 20.0, as tables of numbers have it. Raises ValueError."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, not {value!r}") from None


def finite(name: str, value: object) -> float:
    """Any number that is finite, as Python's. Raises ValueError."""
    try:
        if isinstance(value, str | bytes | bool) or not math.isfinite(value):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a finite number, not {value!r}") from None


def if_given(check: Callable[[str, object], Number], **values: object) -> list[Number | None]:
    """The values in their order, checked by their names; None stays."""
    return [None if value is None else check(name, value) for name, value in values.items()]


def picture(given: object, name: str) -> Image.Image:
    """A picture, or the file of one. Raises ValueError."""
    if isinstance(given, Image.Image):
        return given
    if isinstance(given, str | os.PathLike):
        return read(given)
    raise ValueError(f"{name} must be a PIL image or a path, not {type(given).__name__}")


def pictures(given: object, count: int, name: str) -> list[Image.Image]:
    """Of None, one picture for all, or one for each of `count`, a list; files are read. Raises ValueError."""
    if given is None:
        return []
    found = [picture(one, name) for one in (given if isinstance(given, list | tuple) else [given])]
    if len(found) not in (1, count):
        raise ValueError(f"{name} are {len(found)}, for {count} pictures")
    return found


def check_ranges(
    strength: float, hires_strength: float, hires: float | None, clip_skip: int | None, layers: int
) -> None:
    """Raise ValueError for one that is out of range; layers: of the text encoder."""
    if clip_skip is not None and not 1 <= clip_skip <= layers:
        raise ValueError(f"clip_skip must be from 1 to {layers}, not {clip_skip}")
    if hires is not None and not 1 < hires <= 4:
        raise ValueError(f"hires must be over 1 and at most 4, not {hires}")
    for name, value in (("strength", strength), ("hires_strength", hires_strength)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be over 0 and at most 1, not {value}")


def given_latents(latents: Tensor, noise: PictureNoise) -> Tensor:
    """In the place of noise: on its device, in its dtype. Raises ValueError where they have not its shape."""
    shape = [len(noise.generators), *noise.shape]
    if list(latents.shape) != shape:
        raise ValueError(f"latents are {list(latents.shape)}, not {shape}")
    return latents.to(noise.device, noise.dtype)


def read_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """torch.float16, "float16" or "fp16". Raises ValueError for what is none that weights can be in."""
    found = getattr(torch, dtype_name(dtype), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16, or its name, not {dtype!r}")
    return found

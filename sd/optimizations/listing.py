"""The list of optimizations for people: `python sd/inference.py --list-opts`."""

import re
import textwrap
from collections.abc import Iterable, Iterator
from types import MappingProxyType

import torch

from sd import gpus
from sd.kernels import native
from sd.optimizations.base import Optimization, Stage
from sd.optimizations.gains import Gain, gains, machine_of
from sd.optimizations.registry import PRESETS, catalog

WIDTH = 100
NAME, EXACT, GAIN = 17, 7, 21
"""Columns."""

PURPOSES = MappingProxyType(
    {
        "Shorter numbers": (Stage.PRECISION, Stage.QUANTIZATION),
        "Faster kernels": (Stage.LAYOUT, Stage.ATTENTION, Stage.LAYERS, Stage.BLOCKS, Stage.PREPACKING),
        "Less to compute": (Stage.REUSE, Stage.CALLS),
        "Less waiting for Python": (Stage.COMPILATION, Stage.CAPTURE, Stage.NOISE, Stage.LOOP),
        "Fewer calls of the UNet": (Stage.GUIDANCE,),
        "Memory": (Stage.MEMORY,),
    }
)
"""What optimizations are for, by the stage that applies them."""

MEANINGS = MappingProxyType(
    {
        "none": "the plain model",
        "default": "what suits the model and the machine: exact for SD 1.5, with AMX bf16",
        "exact": "all that keeps the picture",
        "cpu": "the same for CPUs",
        "fast": "exact, and deepcache=3",
        "original": "what this project began with: attention by head size, int8 weights",
    }
)


def listing() -> str:
    """All optimizations: by what they are for, those with a gain on this kind of machine first."""
    machine, capability = _here()
    lines = [
        f"On this machine ({machine}): times as fast with it as without, all else the same; dB, how near",
        "pictures stay to those of the plain model in fp32, where that is not exact (40: hard to see).",
    ]
    for purpose, stages in PURPOSES.items():
        found = [one for one in catalog().values() if one.stage in stages]
        lines += ["", purpose, *_group(found, machine, capability)]
    return "\n".join([*lines, "", "Presets", *_presets(), "", "docs/guide shows each of them at work."])


def _here() -> tuple[str, gpus.Capability]:
    """The kind of this machine, as gains name it, and what its GPU can do."""
    if torch.cuda.is_available():
        return machine_of(torch.cuda.get_device_name()), torch.cuda.get_device_capability()
    return machine_of(" ".join(["CPU", *sorted(native.cpu_has())])), gpus.NONE


def _group(found: Iterable[Optimization], machine: str, capability: gpus.Capability) -> Iterator[str]:
    measured = gains()

    def order(one: Optimization) -> tuple:
        best = max((gain.times for gain in measured.get(one.name, ()) if gain.machine == machine), default=0.0)
        return not gpus.enough(one.name, capability), -best

    for one in sorted(found, key=order):
        ordered = sorted(measured.get(one.name, ()), key=lambda gain: gain.machine != machine)
        yield from _lines(one, ordered)


def _lines(one: Optimization, measured: list[Gain]) -> Iterator[str]:
    """Name, whether exact, gain, what it does; as many lines as that takes."""
    needs = "" if one.needs.text == "any device" else f" [{_short(one.needs.text)}]"
    hint = f"={one.hint}: " if one.hint else ""
    text = textwrap.wrap(f"{hint}{one.summary}{needs}", WIDTH - NAME - EXACT - GAIN - 8, break_long_words=False)
    told = [part for gain in _one_each(measured)[:2] for part in textwrap.wrap(str(gain), GAIN)] or ["not measured"]
    exact = "exact" if one.exact else "approx."
    for i in range(max(len(text), len(told))):
        first = (one.name, exact) if i == 0 else ("", "")
        cells = (*first, told[i] if i < len(told) else "", text[i] if i < len(text) else "")
        yield "  ".join(
            ["", *(cell.ljust(width) for cell, width in zip(cells, (NAME, EXACT, GAIN, 0), strict=True))]
        ).rstrip()


def _short(needs: str) -> str:
    needs = re.sub(r"an NVIDIA GPU with (sm\d+) or newer", r"NVIDIA \1+", needs).replace("an NVIDIA GPU", "NVIDIA")
    needs = needs.replace(", and a C++ compiler", ", C++").replace(", in fp32", " in fp32")
    return re.sub(r"\ban? (?=x86|CPU)", "", needs)


def _one_each(measured: list[Gain]) -> list[Gain]:
    """The first of each machine."""
    return list({gain.machine: gain for gain in reversed(measured)}.values())[::-1]


def _presets() -> Iterator[str]:
    return (f"  {name.ljust(NAME)}  {MEANINGS[name]}" for name in PRESETS)

"""`--list-opts`: all of them, by what they are for, in 100 columns, what was measured on this kind of machine first."""

import re

import pytest
import torch

from sd.kernels import native
from sd.optimizations import PRESETS, catalog, listing
from sd.optimizations.base import Stage
from sd.optimizations.listing import MEANINGS, PURPOSES

GROUP = re.compile(r"^[A-Z].*$")


def names(text: str) -> dict[str, list[str]]:
    """Group -> its names, in order."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if GROUP.match(line):
            found[line] = []
        elif match := re.match(r"  ([a-z][\w-]+)  ", line):
            found[list(found)[-1]].append(match[1])
    return found


def test_all_are_there_once_and_in_their_group():
    assert sorted(stage for stages in PURPOSES.values() for stage in stages) == sorted(Stage)
    groups = names(listing())
    assert groups.pop("Presets") == [*PRESETS] == [*MEANINGS]
    assert sorted(name for group in groups.values() for name in group) == sorted(catalog())
    assert "vae-tiling" in groups["Memory"]
    assert "cpu-int8" in groups["Shorter numbers"]


@pytest.mark.parametrize("flags", [{"avx2"}, {"avx2", "avx512f"}, {"avx2", "avx512f", "amx_bf16"}])
def test_it_fits(monkeypatch, flags):
    monkeypatch.setattr(native, "cpu_has", lambda: frozenset(flags))
    lines = listing().splitlines()
    assert max(map(len, lines)) <= 100
    assert all(line == line.rstrip() for line in lines)


def test_what_was_measured_on_such_a_machine_comes_first(monkeypatch):
    monkeypatch.setattr(native, "cpu_has", lambda: frozenset({"avx2"}))
    text = listing()
    assert "this machine (AVX2)" in text
    kernels = names(text)["Faster kernels"]
    assert kernels[0] == "winograd"
    assert kernels.index("cpu-norm") < kernels.index("channels-last") < kernels.index("fused-norm")
    assert re.search(r"^  kv-cache +exact +1\.05x AVX2 .*\n +1\.01x H100$", text, re.MULTILINE)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    text = listing()
    assert "this machine (H100)" in text
    kernels = names(text)["Faster kernels"]
    assert kernels[0] == "fused-norm"
    assert kernels.index("fused-upsample") < kernels.index("winograd")
    assert re.search(r"^  kv-cache +exact +1\.01x H100 .*\n +1\.05x AVX2$", text, re.MULTILINE)


def test_needs_are_short_and_gains_say_what_was_beside():
    text = " ".join(listing().split())
    assert "GroupNorm, SiLU and biases in one kernel [NVIDIA sm80+]" in text
    assert "with GEGLU [CPU in fp32, C++]" in text
    assert re.search(r"cuda-graph exact 2\.32x H100", text)

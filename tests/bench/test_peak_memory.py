"""bench/memory.py counts what the system counts, and the guide tells it on the page of what was switched on."""

import subprocess
import sys

import pytest

from bench import memory
from bench.guide import facts, optimization_page, tables
from sd import optimizations

PROGRAM = "held = bytearray({mib} << 20); held[::4096] = bytes(len(held[::4096])); del held"
"""Touches so many pages, and lets them go: a peak."""

ROWS = """opts,size,peak_gib,command_s
none,512,6.5,30
page-out,512,5.5,31
page-out,768,9,80
"cpu,vae-tiling=32",512,5,40
cpu,512,8,35
"""


def peak(mib: int) -> float:
    """Of a process that this one does not start itself: its own peak would count."""
    program = PROGRAM.format(mib=mib)
    code = f"from bench import memory; print(memory.drawn([{sys.executable!r}, '-c', {program!r}])[0])"
    words = [sys.executable, "-c", code]
    return float(subprocess.run(words, cwd=memory.ROOT, check=True, capture_output=True, text=True).stdout)


def test_a_peak_is_counted_that_is_over_when_the_process_ends():
    assert peak(400) - peak(100) == pytest.approx(300 << 20, rel=0.1)


def test_a_command_that_fails_says_why():
    with pytest.raises(RuntimeError, match="no such thing"):
        memory.drawn([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_the_command_is_one_that_draws(tiny_checkpoint, tmp_path):
    _, seconds = memory.drawn(memory.command(tiny_checkpoint, "page-out", 64, tmp_path / "a.png"))
    assert seconds > 0
    assert (tmp_path / "a.png").exists()


def test_the_guide_tells_it_beside_what_lacks_just_this(monkeypatch, tmp_path):
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "memory.csv").write_text(ROWS)
    monkeypatch.setattr(facts, "RESULTS", tmp_path)
    monkeypatch.setattr(facts, "MACHINES", {"a CPU": ("machine",)})
    monkeypatch.setattr(optimization_page, "ROOT", tmp_path)
    assert [m.gib for m in facts.saved("page-out")] == [(6.5, 5.5)]
    assert [m.gib for m in facts.saved("vae-tiling")] == [(8.0, 5.0)]
    assert facts.saved("winograd") == []
    said = optimization_page.memory(optimizations.catalog()["page-out"])
    assert "6.50 GiB | 5.50 GiB | `--opt page-out` beside `none`, 512x512 | 30 and 31 s" in said
    assert optimization_page.memory(optimizations.catalog()["winograd"]) == ""


def test_the_index_says_memory_where_no_time_was_measured(monkeypatch):
    one = facts.Saved("a CPU", memory.ROOT, {"peak_gib": "6.5"}, {"peak_gib": "5.5"})
    monkeypatch.setattr(facts, "measured", lambda name: [])
    monkeypatch.setattr(facts, "saved", lambda name: [one] if name == "page-out" else [])
    assert tables.gained("page-out") == "memory: 6.50 to 5.50 GiB (a CPU)"
    assert tables.gained("winograd") == "not measured yet"

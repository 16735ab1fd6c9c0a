"""docs/guide is what its generator makes, every optimization has its page, and what a page links to is there."""

import functools
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import gains
from bench.common import ROOT, read_csv
from bench.guide import book, chapters, facts, front, optimization_page, pictures, ways, work
from sd import optimizations
from sd.optimizations.base import Optimization
from sd.pipeline import DEMO_CHECKPOINT

pytest.importorskip("triton", reason="the pages show modules that need Triton")

GUIDE = ROOT / "docs" / "guide"
PICTURES = GUIDE / "pictures"
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@functools.cache
def made() -> dict[str, str]:
    return book.pages(PICTURES)


def test_what_is_committed_is_what_is_made():
    for name, content in made().items():
        assert (GUIDE / name).read_text() == content, f"make guide; docs/guide/{name}"
    there = {path.relative_to(GUIDE).as_posix() for path in GUIDE.rglob("*") if path.suffix in (".md", ".svg")}
    assert there == made().keys(), "a page that nobody makes"


def test_every_optimization_has_a_chapter_and_a_page_and_no_other_has():
    names = set(optimizations.catalog())
    assert {path.stem for path in chapters.FOLDER.glob("*.md")} == names
    assert {Path(name).stem for name in made() if name.startswith("opts/")} == names
    assert all(f"(opts/{name}.md)" in made()["README.md"] for name in names)


def test_links_and_pictures_are_there():
    for name, text in made().items():
        for target in LINK.findall(text) if name.endswith(".md") else ():
            if not target.startswith("http"):
                assert ((GUIDE / name).parent / target).exists(), f"{name}: {target}"


def test_drawings_are_well_formed_and_the_same_on_any_page():
    drawings = [text for name, text in made().items() if name.endswith(".svg")]
    for text in drawings:
        root = ElementTree.fromstring(text)
        assert root.find("{http://www.w3.org/2000/svg}title").text
    assert len(drawings) > len(optimizations.catalog())


def test_it_stays_small():
    assert sum(path.stat().st_size for path in GUIDE.rglob("*") if path.is_file()) < 4e6


def test_pages_name_no_machine_and_no_day():
    for name, text in made().items():
        assert not re.search(r"20\d\d-\d\d-\d\d", text), name
        assert str(ROOT) not in text, name


# ---- what changes a page


def page_of(one: Optimization) -> str:
    chapter = chapters.read(one.name)
    return optimization_page.page(one, chapter, work.plain(), pictures.read(PICTURES), ("", ""))[0]


def test_a_changed_docstring_changes_its_page(monkeypatch):
    one = optimizations.catalog()["async-noise"]

    assert "> Noise goes to the device from pinned memory" in page_of(one)
    monkeypatch.setattr(one.function, "__doc__", "Quite another. Hurts: the eyes.")
    after = page_of(one)
    assert "> Quite another." in after
    assert "## When it hurts\n\nThe eyes." in after


def test_a_changed_gain_changes_its_page(tmp_path):
    known = gains.read()
    (entry,) = known["winograd"]
    path = tmp_path / "gains.json"
    path.write_text(json.dumps({**known, "winograd": [{**entry, "after": 7.77, "device": "another CPU"}]}))
    assert [m.entry["after"] for m in facts.measured("winograd")] == [entry["after"]]
    assert ("another CPU", 7.77) in [(m.machine, m.ratio) for m in facts.measured("winograd", path)]


def test_a_gain_of_two_switches_is_not_told_as_that_of_one():
    """A wait less gains nothing without a graph behind it; alone it was never timed."""
    (row,) = (line for line in made()["README.md"].splitlines() if line.startswith("| [async-noise]"))
    assert re.findall(r"\d\.\d\dx \(([^)]*)\)", row)
    assert all("with cuda-graph" in where for where in re.findall(r"\d\.\d\dx \(([^)]*)\)", row))


def test_a_dtype_is_measured_by_the_plain_picture_in_it():
    folder = facts.RESULTS / "h200" / "graph"
    fp32, bf16 = ({r["opts"]: r for r in read_csv(folder / f"{name}.csv")}["none"] for name in ("fp32", "bf16"))
    (found,) = facts.measured("bf16")
    assert (found.machine, found.ratio) == ("H200", float(fp32["picture_s"]) / float(bf16["picture_s"]))
    assert "--dtype bfloat16" in found.entry["command"]


def test_what_was_not_measured_is_said():
    assert "| CPU, AMX | not measured yet |" in made()["opts/cpu-bf16.md"]
    assert "| CPU, AVX-512 | 1, plain | 2.04x" in made()["opts/cpu-bf16.md"]


# ---- the parts


def test_two_cpus_of_one_name_are_told_apart():
    """gains.json has one entry for a device's name; the results are of two."""
    machines = {m.machine for m in facts.measured("naive")}
    assert {"CPU, AVX2", "CPU, AVX-512", "H100"} <= machines


@pytest.mark.parametrize(("interval", "whole"), [(3, 17), (50, 1)])
def test_counted_work_is_that_of_the_steps_that_are_whole(interval, whole):
    """Against the arithmetic of DeepCache: whole steps, and shallow ones in between."""
    plain, pipe = work.counted_plain(), work.plain()
    with work.switched(pipe, f"deepcache={interval}") as record:
        left = work.counted(pipe, record)
    step = plain.picture / plain.steps
    assert left.picture == pytest.approx(whole * step + (50 - whole) * left.cheapest)


def test_the_work_of_a_step_is_the_one_that_is_known():
    """PyTorch's counter of operations, and the roofline's, by modules."""
    by_modules = sum(call.flops for call in work.step_calls()) / 1e9
    assert work.counted_plain().cheapest == pytest.approx(by_modules, rel=1e-6)
    assert by_modules == pytest.approx(2 * 803.3, rel=1e-4)


def test_ways_are_read():
    panels = ways.read("before\neach step: (x) -> [-to_k, to_v] -> (k, v)\nafter\n[+once]")
    ((lane,), (once,)) = panels.values()
    assert (lane.when, [node.text for node in lane.nodes]) == ("each step", ["x", "to_k, to_v", "k, v"])
    assert [(node.data, node.mark) for node in lane.nodes] == [(True, ""), (False, "-"), (True, "")]
    assert (once.when, once.nodes[0].text, once.nodes[0].mark) == ("", "once", "+")
    with pytest.raises(ValueError, match=r"\(data\) or \[work\]"):
        ways.read("before\nx -> [y]")


def test_a_chapter_without_a_section_is_refused(tmp_path):
    (tmp_path / "a.md").write_text("counted: 3\n\nWhat.\n\n## Way\nbefore\n(x)\n")
    with pytest.raises(ValueError, match="Answer, Exercise, Paper, Roofline"):
        chapters.read("a", tmp_path)


def test_front_pages_use_every_maker():
    used = {name for path in front.FOLDER.glob("*.md") for name in re.findall(r"\{\{([\w-]+)\}\}", path.read_text())}
    assert used == front.makers_of(PICTURES).keys()


# ---- the exercises

BLOCKS = {
    f"{path.name}-{i}": block
    for path in (*chapters.FOLDER.glob("*.md"), *front.FOLDER.glob("*.md"))
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL))
}
PRINTS = {
    "bf16": "1.0 1.0029296875",
    "fp16": "tensor(inf, dtype=torch.float16) tensor(61440., dtype=torch.float16)",
    "channels-last": "(1310720, 4096, 64, 1) (1310720, 1, 20480, 320)",
    "packed-qkv": "[0, 65536, 131072] 65536",
    "kv-cache": "22 180224",
    "shared-halves": "0 True\n1 False",
}
"""What their answers say; the others print numbers that depend on the machine's rounding."""


@pytest.mark.skipif(not DEMO_CHECKPOINT.exists(), reason="the demo model is not here")
@pytest.mark.parametrize("name", BLOCKS)
def test_an_exercise_runs_as_printed_and_its_answer_is_right(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SD_CKPT", str(DEMO_CHECKPOINT))
    exec(compile(BLOCKS[name], name, "exec"), {})
    printed = capsys.readouterr().out
    assert printed.strip()
    assert PRINTS.get(name.partition(".md")[0], "") in printed

"""A ladder's plots: what stands on what, and that the files in bench/results are those of the measurements."""

from xml.etree import ElementTree

import pytest

from bench import common, plots
from bench.charts import Bar, Rung, axis, bars, round_numbers, told
from bench.scatter import Kernel, Point, nearness, roofline
from bench.svg import Drawing

MEASURED = {"picture_s_q1": "0.9", "picture_s_q3": "1.1", "speedup_q1": "1", "speedup_q3": "2", "psnr_db": ""}


def row(name: str, opts: str, seconds: str, exact: str = "1", **more: str) -> dict[str, str]:
    return {"row": name, "opts": opts, "picture_s": seconds, "exact": exact, "speedup": "1.5", **MEASURED, **more}


def texts(drawing: Drawing) -> list[str]:
    return [
        element.text or "" for element in ElementTree.fromstring(str(drawing)).iter() if element.tag.endswith("text")
    ]


def test_a_rung_follows_the_row_whose_switches_it_holds():
    rows = [row("naive", "naive", "4"), row("sdpa", "none", "3"), row("+ a", "a", "2"), row("+ b", "a,b", "1")]
    steps = plots.rungs([*rows, row("c alone", "c", "0.5"), row("+ d", "c,d", "0.4", exact="0")])
    assert [step.label for step in steps] == ["attention spelled out", "plain", "+ a", "+ b", "c alone"]
    assert [step.follows for step in steps] == [True, True, True, True, False]
    assert told(steps[3], steps[2]) == "1.00 s, saves 50.0%"
    assert told(Rung("", 3.0), Rung("", 2.0)) == "3.00 s, costs 50.0%"


def test_an_approximate_row_is_compared_with_its_base():
    base = row("base", "a", "2")
    fast = row("+ b", "a,b", "1", exact="0", psnr_db="20")
    assert [(p.speedup, p.decibels) for p in plots.approximate([base, fast])] == [(2.0, 20.0)]
    assert [(p.speedup, p.decibels) for p in plots.approximate([fast])] == [(1.5, 20.0)]
    assert plots.approximate([base, {**fast, "psnr_db": "inf"}, {**fast, "psnr_db": ""}]) == []


def test_the_plots_in_the_results_are_those_of_the_measurements():
    folder = common.ROOT / "bench" / "results"
    made = plots.of_documents(folder)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.svg")} == made.keys()
    for name, drawing in made.items():
        assert (folder / name).read_text() == str(drawing), f"python bench/report.py --write; {name}"


@pytest.mark.parametrize("log", [False, True])
def test_axes(log):
    place = axis(1, 100, 0, 200, log)
    assert (place(1), place(100)) == (0, 200)
    assert place(10) == pytest.approx(100 if log else 200 * 9 / 99)
    numbers = list(round_numbers(1, 100, log))
    assert numbers == ([1, 2, 5, 10, 20, 50, 100] if log else [20, 40, 60, 80, 100])


def test_what_stands_in_a_drawing_can_be_read():
    drawings = (
        bars("a <b> & c", [Bar("one", ((1.0, "red"), (2.0, "blue")), "3")]),
        nearness("n", [Point("deepcache=3", 1.8, 1.7, 1.9, 20.0, b"webp")], "faster"),
        roofline("r", [Kernel("conv", 100.0, 1e9), Kernel("norm", 1.0, 1e8)], 1e10, 1e9),
    )
    found = [texts(drawing) for drawing in drawings]
    assert {"a <b> & c", "one", "3"} <= set(found[0])
    assert {"deepcache=3", "1.80x, 20.0 dB", "faster"} <= set(found[1])
    assert {"the ridge: 10 FLOP a byte", "1  norm", "2  conv"} <= set(found[2])

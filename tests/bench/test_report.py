"""The tables of the documents are those of bench/results."""

import re
import shutil

import pytest

from bench import common, report


def tables_of(text: str) -> dict[str, str]:
    found = re.findall(r"<!-- table: (.*?) -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert len(found) == text.count("<!-- table:") == text.count("<!-- end -->") == len(dict(found))
    return dict(found)


def test_the_documents_hold_every_table_once_and_as_measured():
    found = [tables_of((common.ROOT / document).read_text()) for document in report.DOCUMENTS]
    names = [name for tables in found for name in tables]
    assert sorted(names) == sorted(report.TABLES)
    for tables in found:
        for name, table in tables.items():
            assert table == report.TABLES[name](), f"python bench/report.py --write; {name}"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("h100-ladder", "| the same and int8 weights, eager | 0.406 s | 7.90 ms | 2.6 GiB | 8e-3, 51 dB |"),
        ("cpu-ladder", "| + Winograd's convolutions | 2.25 s | 7.1 s | 2.05x [1.91, 2.08] | 7.4 GiB | 1e-5 |"),
        ("cpu-peers", "| ours, `--opt cpu` | 7.29 s (2.17x) | 6.36 s (4.55x) | 2.60 s (2.41x) | 1.66 s (3.04x) |"),
        ("cpu-peers-avx512", "| ours, `--opt cpu-int8,cpu` | 1.47 s (4.55x), 5e-2 | 1.91 s (4.38x), 6e-6 |"),
    ],
)
def test_rows_are_those_of_the_files(name, line):
    assert line in report.TABLES[name]().splitlines()


def test_another_result_makes_another_row(tmp_path):
    shutil.copytree(report.RESULTS, tmp_path / "results")
    path = tmp_path / "results" / "cpu2" / "ladder" / "ladder.csv"
    rows = common.read_csv(path)
    common.write_csv(path, [*rows[:2], {**rows[2], "step_s": "9.876"}, *rows[3:]])
    before, after = report.cpu_ladder().splitlines(), report.cpu_ladder(tmp_path / "results").splitlines()
    assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [4]
    assert "| 9.88 s |" in after[4]


def test_tables_are_written_between_their_markers(tmp_path, monkeypatch):
    stale = (
        "# a\n<!-- table: cpu-peers -->\n| old |\n|---|\n<!-- end -->\nb\n<!-- table: other -->\nkept\n<!-- end -->\n"
    )
    (tmp_path / "README.md").write_text(stale)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "DOCUMENTS", ("README.md",))
    assert report.main(["--write"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert tables_of(text) == {"cpu-peers": report.cpu_peers(), "other": "kept"}
    assert text.startswith("# a\n<!--")

"""gains.json: which row is compared with which, what is said of it, and that the file is that of the results."""

import json
from pathlib import Path

import pytest
import torch

from bench import common, gains, ladder
from sd import optimizations
from sd.kernels import native
from sd.optimizations.gains import gains as known
from sd.optimizations.gains import machine_of

SPEED = {"weights": "random", "size": 256, "steps": 2, "batch": 1, "sampler": "ddpm", "pairs": 3}
MACHINE = {"date": "2026-01-01", "commit": "abc", "device": "AMD EPYC", "dtype": "float32", "threads": 2}
MACHINE |= {"torch": "2.13", "cuda": ""}
GPU = {"device": "NVIDIA H100 80GB HBM3", "cuda": "13.0", "dtype": "float16"}


def write_ladder(folder: Path, rows: dict[str, float | str], exact: int = 1, **machine) -> Path:
    """Speed-ups, or seconds of pictures on a GPU, by optimizations; an empty one was not measured."""
    for opts, value in rows.items():
        column = {"picture_s": value, "speedup": value, "speedup_q1": value, "speedup_q3": value}
        common.append_csv(folder / "speed.csv", {"opts": opts, "exact": exact, **SPEED, **column, **MACHINE, **machine})
    return folder / "speed.csv"


def numbers(entries: list[dict]) -> dict[str, tuple]:
    return {entry["item"]: (entry["before"], entry["after"], entry["unit"]) for entry in entries}


def test_a_row_is_compared_with_the_largest_that_it_holds():
    rows = [(), ("a",), ("a", "b"), ("c",), ("a", "b", "d", "e"), ("a", "steps=20")]
    assert gains.steps_of(rows) == [
        ("a", (), ("a",)),
        ("b", ("a",), ("a", "b")),
        ("c", (), ("c",)),
        ("d", ("a", "b"), ("a", "b", "d", "e")),
        ("e", ("a", "b"), ("a", "b", "d", "e")),
    ]


def test_a_row_that_switched_much_on_says_nothing_of_one():
    assert gains.steps_of([(), ("a", "b", "c", "d")]) == []


def test_on_a_cpu_gains_are_ratios(tmp_path):
    path = write_ladder(tmp_path, {"none": 0.97, "winograd": 2.05, "winograd,kv-cache": 2.2, "int8-static": ""})
    entries = gains.of_ladder(path)
    assert numbers(entries) == {"winograd": (None, 2.05, "x"), "kv-cache": (2.05, 2.2, "x")}
    assert entries[1]["beside"] == "winograd"
    assert "--base winograd --opts kv-cache --mode alone" in entries[1]["command"]
    parsed = ladder.parse_arguments(entries[1]["command"].split()[2:])
    assert (parsed.size, parsed.steps, parsed.dtype) == (256, 2, "float32")


def test_on_cuda_gains_are_seconds(tmp_path):
    path = write_ladder(tmp_path, {"none": 1.5, "cuda-graph,async-noise": 0.5}, **GPU)
    entries = gains.of_ladder(path)
    assert numbers(entries) == {"cuda-graph": (1.5, 0.5, "s"), "async-noise": (1.5, 0.5, "s")}
    assert {entry["what"] for entry in entries} == {"H100 picture"}
    assert entries[0]["joined"] == "async-noise"


def test_rows_of_other_settings_are_not_compared(tmp_path):
    write_ladder(tmp_path, {"none": 1.0}, size=512)
    assert gains.of_ladder(write_ladder(tmp_path, {"winograd": 2.0})) == []


def test_an_approximate_one_says_what_it_costs(tmp_path):
    common.append_csv(tmp_path / "fidelity.csv", {"opts": "deepcache=3", "psnr_db": 31.4})
    path = write_ladder(tmp_path, {"none": 1.0, "deepcache=3": 2.1}, exact=0)
    assert gains.of_ladder(path)[0]["psnr_db"] == 31.4


def test_a_run_replaces_what_it_measured_of_its_machine(tmp_path):
    first = gains.update(
        {}, gains.of_ladder(write_ladder(tmp_path / "a", {"none": 1.0, "winograd": 2.0, "naive": 0.9}))
    )
    gpu = gains.of_ladder(write_ladder(tmp_path / "b", {"none": 1.0, "naive": 3.0}, **GPU))
    both = gains.update(first, gpu)
    again = gains.update(both, gains.of_ladder(write_ladder(tmp_path / "c", {"none": 1.0, "naive": 0.8})))
    assert [entry["after"] for entry in again["naive"]] == [3.0, 0.8]
    assert again["winograd"] == first["winograd"]
    gains.write(again, tmp_path / "gains.json")
    assert gains.read(tmp_path / "gains.json") == again


def test_a_ladder_updates_the_file_if_asked(shallow_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "matmul_ceiling", lambda *_: 1e11)
    monkeypatch.setattr(gains, "read", lambda: {})
    written = []
    monkeypatch.setattr(gains, "write", written.append)
    command = ["--weights", str(shallow_checkpoint), "--out", str(tmp_path), "--device", "cpu", "--size", "16"]
    command += ["--steps", "1", "--pairs", "1", "--measure", "speed", "--opts", "channels-last"]
    assert ladder.main(command) == 0
    assert written == []
    assert ladder.main([*command, "--update-gains"]) == 0
    assert sorted(written[0]) == ["channels-last", "naive"]
    assert written[0]["channels-last"][0]["what"] == "CPU picture"


def test_the_file_is_that_of_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(gains.write, "__defaults__", (tmp_path / "gains.json",))
    assert ladder.main(["--gains"]) == 0
    assert (tmp_path / "gains.json").read_text() == gains.FILE.read_text()


def test_the_names_are_optimizations():
    assert len(gains.read()) > 10
    for name in gains.read():
        optimizations.check(name)


def test_the_texts():
    found = {name: list(map(str, entries)) for name, entries in known().items()}
    assert found["winograd"] == ["2.05x AVX2"]
    assert found["cpu-linear"] == ["1.07x AVX2"]  # 2.05 to 2.20 times as fast as the plain model
    assert found["int8-static"] == ["1.07x AVX2, 32 dB"]
    assert found["cuda-graph"][0] == "2.32x H100 with async-noise"  # 1.55 s to 0.670 s
    assert "5: 1.24x AVX-512, 18 dB" in found["tgate"]
    assert found.keys() == gains.read().keys()


def test_machines_are_named_as_the_ladder_names_devices(monkeypatch):
    assert machine_of("NVIDIA H100 80GB HBM3") == "H100"
    assert machine_of("NVIDIA A10") == "A10"
    for flags, expected in ({"avx2"}, "AVX2"), ({"avx2", "avx512f"}, "AVX-512"), ({"avx512f", "amx_bf16"}, "AMX"):
        monkeypatch.setattr(native, "cpu_has", lambda flags=flags: flags)
        assert machine_of(common.device_name(torch.device("cpu"))) == expected


@pytest.mark.parametrize("content", [None, "", "[]", '{"a": 3}', '{"a": [{}]}', '{"a": [{"after": "x", "before": 1}]}'])
def test_a_missing_or_damaged_file_says_nothing(tmp_path, content):
    path = tmp_path / "gains.json"
    if content is not None:
        path.write_text(content)
    assert known(path) == {}


def test_one_line_an_entry(tmp_path):
    gains.write({"a": [{"item": "a"}], "b": [{"item": "b"}, {"item": "b=1"}]}, tmp_path / "gains.json")
    text = (tmp_path / "gains.json").read_text()
    assert json.loads(text) == {"a": [{"item": "a"}], "b": [{"item": "b"}, {"item": "b=1"}]}
    assert [line.strip(" ,") for line in text.splitlines() if "item" in line][1] == '{"item": "b"}'

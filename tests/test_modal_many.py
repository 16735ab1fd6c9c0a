"""A prompts file over several containers: one is killed, a prompt fails, the client is killed, and it all goes on."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import modal
import pytest
import torch

import modal_inference
from bench.reference.numbers import pixels
from sd.pictures.png import read_parameters
from tests.modal_fixtures import drawn_here, wait_for

pytest_plugins = ["tests.modal_fixtures"]

CPU = {"SD_GPU": "none"}
"""A container without a GPU, so that pixels can be compared with those of this machine."""


def write_prompts(path: Path, lines: list[dict]) -> None:
    path.write_text("\n".join(map(json.dumps, lines)))


def times(folder: Path) -> dict[str, int]:
    """File -> when it was written. Hidden ones too: nothing but pictures may lie there."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.full(memory=False)
def test_thirty_prompts_a_killed_container_and_a_bad_prompt(filled, checkpoint, tmp_path):
    prompts, pictures = filled.cwd / "prompts.jsonl", filled.cwd / "pictures"
    lines = [{"prompt": f"a fox {i}", "steps": 1, "seed": 100 + i} for i in range(30)]
    lines[6]["height"] = 100  # not a multiple of 8, which only the model knows
    write_prompts(prompts, lines)
    command = ["run", "modal_inference.py", "--prompts-file", prompts, "--opt", "none", "--max-containers", 3]

    process = filled.start(*command, **CPU)
    plane = filled.plane
    wait_for(lambda: len(list(pictures.glob("*.png"))) >= 5 and sum(bool(t.inputs) for t in plane.tasks.values()) >= 3)
    victim = next(task for task in plane.tasks.values() if task.alive and task.inputs)
    plane.kill(victim)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 2, out + errors
    failed, last = errors.splitlines()
    assert failed.startswith("failed: pictures/00007-106.png")
    assert "line 7: 100x128" in failed
    assert last == "error: 1 of 30 pictures failed; run the same command to try them again"
    assert re.search(r"\[#{30}\] 30/30, 1 failed", out)
    assert "Traceback" not in out + errors
    used = [task for task in plane.tasks.values() if task.inputs]
    assert len(used) >= 3
    assert len({task.process.pid for task in used}) == len(used)
    (variant,) = plane.variants("Model.*")
    assert variant.definition.concurrency_limit == 3

    first = times(pictures)
    assert sorted(first) == [f"{i + 1:05}-{100 + i}.png" for i in range(30) if i != 6]
    for i in (0, 29):
        drawn = pictures / f"{i + 1:05}-{100 + i}.png"
        local = tmp_path / "local.png"
        arguments = ["--prompt", lines[i]["prompt"], "--steps", 1, "--seed", 100 + i]
        drawn_here(local, checkpoint, *arguments)
        assert (pixels(drawn) == pixels(local)).all()
        assert read_parameters(drawn) == read_parameters(local)

    del lines[6]["height"]
    write_prompts(prompts, lines)
    before = set(plane.tasks)
    result = filled.run(*command, **CPU)
    assert result.code == 0, result.text
    second = times(pictures)
    assert set(second) - set(first) == {"00007-106.png"}
    assert {name: second[name] for name in first} == first
    assert sum(len(task.inputs) for name, task in plane.tasks.items() if name not in before) == 1

    again = filled.run(*command, **CPU)
    assert again.code == 0
    assert "all pictures are there already" in again.out


@pytest.mark.full(memory=False)
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_client_that_is_stopped_loses_and_repeats_nothing(filled, end):
    prompts, pictures = filled.cwd / "prompts.txt", filled.cwd / "pictures"
    prompts.write_text("\n".join(f"a cat {i}" for i in range(8)))
    command = ["run", "modal_inference.py", "--prompts-file", prompts, "--steps", 1, "--max-containers", 1]
    process = filled.start(*command, "--opt", "none", **CPU)
    wait_for(lambda: len(list(pictures.glob("*.png"))) >= 2)
    process.send_signal(end)
    _, errors = process.communicate(timeout=300)
    if end == signal.SIGINT:
        assert process.returncode == 130
        (line,) = errors.splitlines()
        assert line.startswith("interrupted; ")
    filled.plane.stop()
    first = {name: written for name, written in times(pictures).items() if name.endswith(".png")}
    assert 2 <= len(first) < 8
    before = set(filled.plane.tasks)
    result = filled.run(*command, "--opt", "none", **CPU)
    assert result.code == 0, result.text
    second = times(pictures)
    assert sorted(second) == [f"{i + 1:05}-{i}.png" for i in range(8)]  # no temporary file stays either
    assert {name: second[name] for name in first} == first
    assert sum(len(task.inputs) for name, task in filled.plane.tasks.items() if name not in before) == 8 - len(first)


@pytest.mark.full(memory=False)
def test_containers_that_cannot_start_end_the_run(filled):
    """Rather than failing for each of ten thousand pictures."""
    (filled.plane.volume("sd-weights") / "broken.safetensors").write_bytes(b"not a checkpoint")
    (filled.cwd / "p.txt").write_text("a\nb\nc\n")
    arguments = ["--prompts-file", "p.txt", "--ckpt", "broken.safetensors", "--max-containers", 3]
    result = filled.run("run", "modal_inference.py", *arguments, **CPU)
    assert result.code == 2
    (line,) = result.errors.splitlines()
    assert line.startswith("error: no picture can be drawn: ")
    assert "broken.safetensors" in line
    assert list((filled.cwd / "pictures").iterdir()) == []
    assert len(filled.plane.tasks) == 1


# ---- writing results, without Modal


def test_a_thousand_pictures_are_not_held(tmp_path, monkeypatch):
    """Each is on the disk before the next is asked for, whatever the order."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # 2 seconds of them
    pictures, _ = modal_inference.plan_file(prompts_file(tmp_path, 1_000), {}, tmp_path / "out", "demo", False)

    def results() -> Iterator[dict]:
        for job, file in reversed(pictures):
            yield {"index": job.index, "png": b"%d" % job.index}
            assert file.read_bytes() == b"%d" % job.index

    assert modal_inference.write_results(results(), pictures) == {}
    assert len(list((tmp_path / "out").iterdir())) == 1_000


def prompts_file(folder: Path, count: int) -> str:
    path = folder / "p.txt"
    path.write_text("\n".join(f"prompt {i}" for i in range(count)))
    return str(path)


@pytest.mark.parametrize(
    ("error", "stops"),
    [
        (ValueError("100x128 is not a multiple of 16"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
    ],
)
def test_a_container_whose_gpu_has_failed_takes_no_more(monkeypatch, error, stops):
    stopped = []
    monkeypatch.setattr(modal.experimental, "stop_fetching_inputs", lambda: stopped.append(True))
    modal_inference.give_up_if_broken(error, SimpleNamespace(device=torch.device("cpu")))
    assert bool(stopped) == stops


def test_what_has_no_result_has_failed(tmp_path):
    """A container that is lost does not say which picture it had."""
    pictures, _ = modal_inference.plan_file(prompts_file(tmp_path, 4), {}, tmp_path / "out", "demo", False)
    results = [{"index": 2, "png": b"x"}, {"index": 3, "error": "too large"}, RuntimeError("lost"), RuntimeError()]
    assert modal_inference.write_results(results, pictures) == {3: "too large", 1: "RuntimeError", 4: "RuntimeError"}

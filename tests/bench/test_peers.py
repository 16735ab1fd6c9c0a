"""The comparison with other engines, on a tiny model: who is measured, what is written, what is not measured again."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import common, peer_engines, peers_cpu
from bench.peer_engines import Engine, Opened, Run, Task
from bench.reference.numbers import noise, relative_error
from sd.guidance import Call
from sd.kernels import native


def compare(checkpoint: Path, folder: Path, *arguments: str) -> int:
    """The comparison on a tiny model at 64x64 in two rounds."""
    held = ["--weights", str(checkpoint), "--sizes", "64", "--rounds", "2", "--threads", "1", "--opts", "channels-last"]
    return peers_cpu.main([*held, "--work", str(folder), "--out", str(folder / "peers.csv"), *arguments])


def opened(engine: str, checkpoint: Path, *parts: str) -> dict[str, Run]:
    """What an engine computes for each part, in this process."""
    task = Task(engine, checkpoint, 64, parts, threads=1, steps=2)
    with torch.inference_mode():
        calls = peer_engines.find(engine).open(task)
        return {part: calls[part]() for part in parts}


def error(run: Run, reference: Run) -> float:
    return relative_error(*(torch.from_numpy(given.output) for given in (run, reference)))


@pytest.mark.full(memory=False)
def test_diffusers_computes_what_we_do(tiny_checkpoint):
    parts = ("step", "decode", "picture")
    ours = opened("plain", tiny_checkpoint, *parts)
    assert [ours[part].output.shape for part in parts] == [(2, 4, 8, 8), (1, 3, 64, 64), (64, 64, 3)]
    for engine in ("diffusers", "diffusers-cl", "ours:channels-last"):
        theirs = opened(engine, tiny_checkpoint, *parts)
        assert all(error(theirs[part], ours[part]) < 1e-3 for part in parts)
        assert all(run.seconds > 0 and run.peak > 2**26 for run in theirs.values())


@pytest.mark.full(memory=False)
@pytest.mark.parametrize("engine", ["diffusers-bf16", "diffusers-bf16-cl"])
def test_diffusers_in_bf16_computes_about_what_we_do(tiny_checkpoint, engine):
    ours, theirs = (opened(engine, tiny_checkpoint, "step", "decode") for engine in ("plain", engine))
    assert all(1e-3 < error(theirs[part], ours[part]) < 5e-2 for part in ours)


@pytest.mark.full(memory=False)
@pytest.mark.parametrize(
    ("engine", "package", "bound"),
    [("openvino", "openvino", 1e-4), ("openvino-bf16", "openvino", 0.2), ("openvino-int8", "nncf", 0.3)],
)
def test_openvino_computes_what_we_do(tiny_checkpoint, engine, package, bound):
    pytest.importorskip(package)
    ours, theirs = (opened(engine, tiny_checkpoint, "step", "decode") for engine in ("plain", engine))
    assert all(error(theirs[part], ours[part]) < bound for part in ours)


def test_short_is_all_engines_of_short_numbers():
    args = peers_cpu.parse_arguments(["--engines", "short", "--sizes", "64"])
    args.opts = ["cpu"]
    groups = peers_cpu.groups_of(args)
    assert set(groups[0].engines) == {name for name in peer_engines.ENGINES if "bf16" in name or "int8" in name}


@pytest.fixture
def kernels_come_back(monkeypatch):
    monkeypatch.setattr(native, "compiler", native.compiler)
    yield
    native.attempt.cache_clear()


@pytest.mark.usefixtures("kernels_come_back")
def test_without_a_compiler(tiny_checkpoint):
    ours, slow = (opened(engine, tiny_checkpoint, "step", "decode") for engine in ("plain", "ours-pytorch"))
    assert native.why_not().startswith("no C++ compiler")
    assert all(error(slow[part], ours[part]) < 1e-4 for part in ours)


def test_one_step_from_the_highest_noise(tiny_checkpoint):
    """stable-diffusion.cpp's picture of one Euler step, against k-diffusion's formulas: x - sigma * eps."""
    from sd.schedules import alphas_cumprod

    pipe = peer_engines.load(Task("plain", tiny_checkpoint, 64, (), 1))
    abar = alphas_cumprod()[peer_engines.FIRST_TIMESTEP]
    sigma = ((1 - abar) / abar) ** 0.5
    x = sigma * noise(1, 4, 8, 8, seed=peer_engines.SEED)
    with torch.inference_mode():
        context = pipe.encode_prompts([peer_engines.PROMPT], [""])
        scaled = torch.cat([x, x]) / (sigma**2 + 1) ** 0.5
        uncond, cond = pipe.unet(scaled, torch.tensor(peer_engines.FIRST_TIMESTEP), context).chunk(2)
        image = pipe.decode(x - sigma * (uncond + peer_engines.SCALE * (cond - uncond)))[0]
        expected = (image.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255
        actual = peer_engines.glimpse(pipe, 64)
    assert (actual - expected).abs().max() < 0.51


def test_the_log_of_stable_diffusion_cpp_tells_the_times():
    watch = peer_engines.Stopwatch()
    for line in ("generating image: 1/1 - seed 7", "sampling completed, taking 9.00s", "generating 1 latent images"):
        watch.hear(f"[INFO ] stable-diffusion.cpp:3401 - {line}\n")
    assert list(watch.seconds) == ["step"]
    watch.hear("decoding 1 latents")
    watch.hear("decode_first_stage completed, taking 30.00s")
    assert list(watch.seconds) == list(watch.peaks) == ["step", "decode"]
    assert all(0 < seconds < 1 for seconds in watch.seconds.values())


class Local:
    """A worker in this process."""

    def __init__(self, task: Task, deadline: peers_cpu.Deadline):
        self.opened = Opened(0.0, 1)
        self.calls = peer_engines.find(task.engine).open(task)
        self.first = {part: self.run(part) for part in task.parts}

    @torch.inference_mode()
    def run(self, part: str) -> Run:
        return self.calls[part]()

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, *_) -> None:
        pass


@pytest.mark.full(memory=False)
def test_comparison_is_written_and_not_repeated(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """OpenVINO as if it were not installed."""
    absent = Engine("OpenVINO", peer_engines.open_openvino, "no-such-package==1.0")
    monkeypatch.setitem(peer_engines.ENGINES, "openvino", absent)
    monkeypatch.setattr(peers_cpu, "Worker", Local)
    arguments = ("--baseline", "plain", "--engines", "ours,openvino", "--picture", "--steps", "2")
    assert compare(tiny_checkpoint, tmp_path, *arguments) == 0
    rows = common.read_csv(tmp_path / "peers.csv")
    parts, names = ("step", "decode", "picture"), ("plain", "ours:channels-last")
    assert [(row["engine"], row["part"]) for row in rows] == [(name, part) for part in parts for name in names]
    assert all(float(row["median_s"]) > 0 and float(row["relative_error"]) < 1e-3 for row in rows)
    assert {row["speedup"] for row in rows if row["engine"] == "plain"} == {"1"}
    assert (tmp_path / "peers.png").stat().st_size > 1000
    output = capsys.readouterr().out
    assert "skipped: pip install no-such-package==1.0" in output
    assert "| ours, channels-last |" in output

    monkeypatch.setattr(peers_cpu, "Worker", lambda *_: pytest.fail("measured again"))
    assert compare(tiny_checkpoint, tmp_path, *arguments) == 0


class Idle(Local):
    """A worker whose engine answers at once."""

    def __init__(self, task: Task, deadline: peers_cpu.Deadline):
        self.opened, self.first = Opened(0.0, 1), {part: self.run(part) for part in task.parts}

    def run(self, part: str) -> Run:
        return Run(1.0, 1, np.ones((4, 4, 3), np.float32))


def test_engines_take_turns_at_being_first():
    order = []
    group, deadline = peers_cpu.Group(64, ("step", "decode"), ("b",), rounds=2), peers_cpu.Deadline(60)
    first, second = (Idle(Task("plain", Path(), 64, (), 1), deadline) for _ in range(2))
    for name, worker in (("a", first), ("b", second)):
        worker.run = lambda part, name=name: order.append(name + part[0])
    peers_cpu.take_turns(first, second, group, deadline)
    assert order == ["as", "bs", "bs", "as", "ad", "bd", "bd", "ad"]


def test_a_failure_is_a_row_and_is_tried_again(tiny_checkpoint, tmp_path, monkeypatch):
    tried = []

    def worker(task: Task, deadline: peers_cpu.Deadline) -> Idle:
        if task.engine.startswith("ours:"):
            tried.append(task.engine)
            raise peers_cpu.EngineError("out of memory")
        return Idle(task, deadline)

    monkeypatch.setattr(peers_cpu, "Worker", worker)
    for _ in range(2):
        assert compare(tiny_checkpoint, tmp_path, "--engines", "ours,plain") == 1
    rows = common.read_csv(tmp_path / "peers.csv")
    assert tried == ["ours:channels-last"] * 2
    assert [row["engine"] for row in rows if row["error"] == "out of memory"] == tried * 2
    assert [row["engine"] for row in rows if not row["error"]] == ["diffusers", "plain"] * 2


def test_the_budget_ends_a_comparison(tiny_checkpoint, tmp_path):
    assert compare(tiny_checkpoint, tmp_path, "--engines", "plain", "--budget", "0") == peers_cpu.UNFINISHED
    assert common.read_csv(tmp_path / "peers.csv") == []


def test_a_worker_is_a_process(tiny_checkpoint):
    task = Task("plain", tiny_checkpoint, 64, ("step",), 1)
    with peers_cpu.Worker(task, peers_cpu.Deadline(60)) as worker:
        assert worker.process.is_alive()
        assert error(worker.run("step"), opened("plain", tiny_checkpoint, "step")["step"]) < 1e-6
        assert worker.opened.peak > 2**26
        with pytest.raises(peers_cpu.EngineError, match="plain: KeyError"):
            worker.run("no such part")
        with pytest.raises(peers_cpu.EngineError, match="plain: its process ended with code 0"):
            worker.run("step")
    assert not worker.process.is_alive()


@pytest.mark.parametrize("arguments", [("--engines", "tensorrt"), ("--opts", "chanels-last"), ("--baseline", "none")])
def test_unknown_names_are_the_users_mistake(tmp_path, arguments, capsys):
    assert peers_cpu.main([*arguments, "--out", str(tmp_path / "peers.csv")]) == 2
    assert capsys.readouterr().err.startswith("peers_cpu.py: no ")


def test_the_most_telling_pairs_come_first():
    args = peers_cpu.parse_arguments(["--opts", "exact", "--opts", "none", "--picture"])
    groups = peers_cpu.groups_of(args)
    order = [(group.size, group.engines[0], group.parts[0]) for group in groups]
    assert order[:3] == [(512, "ours:exact", "step"), (256, "ours:exact", "step"), (512, "ours:exact", "picture")]
    assert order[3:] == [(512, "sdcpp-f16", "step"), (256, "sdcpp-f16", "step")]
    assert groups[0].engines[:3] == ("ours:exact", "ours:none", "diffusers")
    assert {name for group in groups for name in group.engines} == {"ours:exact", "ours:none", *peer_engines.ENGINES}


def test_a_step_of_ours_says_that_its_halves_are_alike():
    """Or shared-halves would do nothing, and be measured as if it did."""
    call, seen = Call(), []
    pipe = SimpleNamespace(call=call, unet=lambda *given: seen.append((given, call.halves_alike)))
    peer_engines.our_step(pipe, (1, 2, 3))
    assert seen == [((1, 2, 3), True)]
    assert not call.halves_alike

"""The benchmarks on tiny models: their arithmetic against other implementations, and what they write and return."""

import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from bench import common, fidelity, gallery, ladder, report, roofline, rungs, speed
from bench.common import ROOT
from bench.compilation import Counts
from bench.reference.numbers import psnr
from bench.reference.weights import tiny_config
from sd import optimizations
from sd.config import SD15
from sd.models import build
from sd.optimizations import registry
from sd.optimizations.base import Optimization, Patch, Stage
from sd.pipeline import StableDiffusion

CPU = torch.device("cpu")
HELD = ("size", "steps", "batch", "sampler")


@pytest.fixture
def tiny_pipe() -> StableDiffusion:
    return common.random_pipeline(tiny_config())


def pictures(seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(random.uniform(0, 255, (40, 48, 3)), (3, 3, 0))
    noisy = smooth + random.normal(0, 12, smooth.shape)
    return smooth.astype(np.uint8), noisy.clip(0, 255).astype(np.uint8)


# ---- fidelity


def test_psnr():
    black, gray = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 16, np.uint8)
    assert psnr(black, gray) == pytest.approx(20 * math.log10(255 / 16))
    assert psnr(gray, gray) == math.inf


@pytest.mark.parametrize("seed", range(3))
def test_ssim_against_scipy(seed):
    """The same formula with scipy's own Gaussian filter, cropped to where the window lies within the picture."""

    def blur(x):
        return ndimage.gaussian_filter(x, (1.5, 1.5, 0), truncate=3.5)[5:-5, 5:-5]

    first, second = pictures(seed)
    x, y = first.astype(float), second.astype(float)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = 6.5025, 58.5225
    index = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    assert fidelity.ssim(first, second) == pytest.approx(index.mean(), abs=1e-9)
    assert fidelity.ssim(first, first) == pytest.approx(1)


def test_drawings_are_compared_step_by_step():
    base = [torch.ones(2, 4, 8, 8), torch.ones(2, 4, 8, 8), torch.ones(2, 4, 8, 8)]
    picture = np.stack(pictures(0))
    off = [base[0] * 1.1, base[1] * 1.2, base[2] * 1.4]
    result = fidelity.compare(fidelity.Drawing(off, picture), fidelity.Drawing(base, picture))
    assert result.errors == pytest.approx([0.1, 0.2], abs=1e-6)
    assert result.error_last == pytest.approx(0.4, abs=1e-6)
    assert (result.psnr_db, result.pictures) == (math.inf, 2)
    shorter = fidelity.compare(fidelity.Drawing(off[1:], picture), fidelity.Drawing(base, picture))
    assert shorter.errors == []
    assert math.isnan(shorter.error_median)


def test_drawing_leaves_the_pipeline_alone(tiny_pipe, monkeypatch):
    monkeypatch.setattr(fidelity, "PROMPTS", fidelity.PROMPTS[:3])
    decode = tiny_pipe.decode
    drawing = fidelity.draw(tiny_pipe, steps=2, batch=2)
    assert tiny_pipe.decode == decode
    assert drawing.pictures.shape == (3, 64, 64, 3)
    assert [x.shape for x in drawing.latents] == [(3, 4, 8, 8)] * 3
    assert torch.equal(drawing.latents[-1], drawing.latents[-2])  # with a callback and without
    alone = np.asarray(tiny_pipe.generate(fidelity.PROMPTS[0], seed=0, steps=2)[0])
    assert np.abs(alone.astype(int) - drawing.pictures[0]).max() <= 1  # rounding differs in a batch


# ---- work


def test_flops_of_sd15():
    assert common.unet_flops(SD15, 512, 512) / 1e9 == pytest.approx(803.3, abs=0.05)
    gflop = {model: sum(c.flops for c in roofline.work_of(SD15, model, 512)) / 1e9 for model in ("unet", "vae", "text")}
    assert gflop["unet"] / 2 == pytest.approx(803.3, abs=0.05)  # two latents: with guidance
    assert gflop["vae"] == pytest.approx(2515, abs=0.5)
    assert gflop["text"] / 2 == pytest.approx(13.3, abs=0.05)


@pytest.mark.parametrize("model", ["unet", "vae", "text"])
def test_roofline_counts_what_pytorch_counts(model):
    pipe = StableDiffusion(tiny_config(), *build(tiny_config()))
    forward = roofline.forward_of(pipe, model, 64, batch=1)
    assert sum(call.flops for call in roofline.work_of(tiny_config(), model, 64)) == common.count_flops(forward)


def test_roofline_covers_all_of_the_time(tiny_pipe):
    forward = roofline.forward_of(tiny_pipe, "unet", 64, batch=1)
    before = [dict(vars(module)) for module in tiny_pipe.unet.modules()]
    calls, seconds = roofline.record(tiny_pipe, forward, repeats=1)
    lines = roofline.table_of(calls, seconds, roofline.Ceilings(1e11, 1e10))
    assert [dict(vars(module)) for module in tiny_pipe.unet.modules()] == before
    assert sum(line.share for line in lines) == pytest.approx(1)
    assert {line.kind for line in lines} >= {"conv3x3", "conv1x1", "self-attention", "cross-attention", "feed-forward"}
    assert {line.grid for line in lines if line.kind == "conv3x3"} == {"8x8", "4x4", "2x2", "1x1"}
    conv = next(call for call in calls if call.kind == "conv3x3")  # 4 -> 32 channels on 8x8, two latents, fp32
    assert conv.bytes == 4 * (2 * 64 * (4 + 32) + 32 * 4 * 9 + 32)


def test_roofline_writes_its_files(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(roofline.Ceilings, "of", lambda *_: roofline.Ceilings(1e11, 1e10))
    command = ["--weights", str(tiny_checkpoint), "--device", "cpu", "--size", "64", "--repeats", "1", "--model", "vae"]
    assert roofline.main([*command, "--out", str(tmp_path), "--trace", str(tmp_path / "trace.json")]) == 0
    lines = common.read_csv(tmp_path / "roofline-vae-64-b1.csv")
    assert {"kind", "grid", "gflop", "floor_ms", "measured_ms", "bound", "commit", "torch", "device"} <= set(lines[0])
    assert (tmp_path / "roofline-vae-64-b1.png").stat().st_size > 1000
    assert (tmp_path / "trace.json").stat().st_size > 1000


# ---- shared parts


def test_random_weights_are_the_same_again_and_draw(tiny_pipe):
    again = common.random_pipeline(tiny_config())
    assert all(torch.equal(a, b) for a, b in zip(tiny_pipe.unet.parameters(), again.unet.parameters(), strict=True))
    assert np.asarray(tiny_pipe.generate("a cat", seed=1, steps=2)[0]).std() > 1


def test_a_clone_shares_memory_but_not_changes(tiny_pipe):
    clone = common.clone_pipeline(tiny_pipe)
    models = (tiny_pipe.clip, tiny_pipe.unet, tiny_pipe.vae)
    everything = sum(tensor.nbytes for model in models for tensor in model.state_dict().values())
    assert common.shared_bytes(clone, tiny_pipe) == everything
    optimizations.apply(clone, ["channels-last", "packed-qkv"])
    assert common.shared_bytes(clone, tiny_pipe) < everything
    assert all(weight.is_contiguous() for weight in tiny_pipe.unet.parameters())
    assert not tiny_pipe.unet.input_blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_calls_take_turns_at_being_first():
    order = []
    calls = [lambda name=name: order.append(name) or name for name in "ab"]
    assert common.interleave(calls, 3) == [["a"] * 3, ["b"] * 3]
    assert "".join(order) == "abbaab"


def test_spread():
    assert common.Spread.of([3.0]) == common.Spread(3.0, 3.0, 3.0)
    assert common.Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == common.Spread(3.0, 2.0, 4.0)


def test_a_csv_file_keeps_its_columns(tmp_path):
    path = tmp_path / "new" / "file.csv"
    common.append_csv(path, {"a": 1, "b": "x, y"})
    common.append_csv(path, {"a": 2, "b": ""})
    assert common.read_csv(path) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": ""}]
    with pytest.raises(ValueError, match="other columns"):
        common.append_csv(path, {"a": 3, "c": 4})


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux tells the peak of a call")
def test_peak_memory_is_above_the_floor():
    meter = common.MemoryMeter(CPU)
    held = []
    peak = meter.peak(lambda: held.append(torch.ones(32 * 2**20)))
    assert peak == pytest.approx(128 * 2**20, rel=0.2)


def test_where_nothing_tells_the_peak_it_is_not_a_number(monkeypatch):
    monkeypatch.setattr(common, "_reset_resident_peak", lambda: False)
    assert math.isnan(common.MemoryMeter(CPU).peak(lambda: None))


def test_environment_names_versions_and_commit(monkeypatch):
    monkeypatch.setenv("BENCH_COMMIT", "abc123")
    row = common.environment(CPU, torch.float16)
    assert row["commit"] == "abc123"
    assert row["dtype"] == "float16"
    assert row["torch"] == torch.__version__


# ---- the ladder


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("cumulative", ["naive", "none", "z", "z,a", "z,a,b"]),
        ("leave-one-out", ["naive", "none", "z", "z,a,b", "z,b", "z,a"]),
        ("alone", ["naive", "none", "z", "z,a", "z,b"]),
    ],
)
def test_rows(mode, expected):
    assert [row.key for row in rungs.rows_of(["z"], ["a", "b"], mode)] == expected


def test_knobs_are_no_optimizations():
    row = rungs.Row("", ("channels-last", "steps=20", "sampler=ddim"))
    assert row.optimizations == ["channels-last"]
    assert row.sampling(50, "ddpm") == {"sampler": "ddim", "schedule": None, "steps": 20}
    row = ladder.Row("few", ("sampling=dpmpp_2m:karras:20",))
    assert row.sampling(50, "ddpm") == {"sampler": "dpmpp_2m", "schedule": "karras", "steps": 20}
    assert not row.optimizations
    assert not row.exact
    assert rungs.Row("", ("channels-last",)).exact
    assert not rungs.Row("", ("channels-last", "deepcache=3")).exact


def test_a_preset_leaves_out_what_the_rows_cannot_have():
    """Its weights mapped from a file: the rows share them in memory. What somebody types is tried."""
    cpu = torch.device("cpu")
    assert set(rungs.parse_names("cpu", cpu)) == set(registry.PRESETS["cpu"](rungs.Machine(cpu))) - {"page-out"}
    assert rungs.parse_names("page-out", cpu) == ["page-out"]


def test_compiling_pays_after():
    assert speed.pays_after(0, 0.5) == 0
    assert speed.pays_after(10, 0.4) == 25
    assert speed.pays_after(10, -0.1) == math.inf


@pytest.mark.parametrize(
    ("names", "warm", "again", "problem"),
    [
        ((), Counts(), Counts(), ""),
        (("compile",), Counts(graphs=3), Counts(graphs=3), ""),
        (("compile",), Counts(graphs=3), Counts(graphs=5), "2 recompilations"),
        (("compile",), Counts(graphs=3, graph_breaks=1), Counts(graphs=3, graph_breaks=1), "1 graph breaks"),
        (("compile",), Counts(graphs=3), Counts(graphs=3, skipped=4), "4 CUDA graphs skipped"),
        (("cuda-graph",), Counts(captures=3), Counts(captures=4), "1 CUDA graphs captured again"),
        (("loop-graph",), Counts(captures=3), Counts(captures=5), ""),
        (("cuda-graph",), Counts(), Counts(), "no CUDA graph captured"),
    ],
)
def test_problems_are_named(names, warm, again, problem):
    assert speed.find_problems(rungs.Row("", names), warm, again, on_cuda=True) == problem


def climb(checkpoint, out, *arguments: str) -> int:
    """The ladder on a small model: two steps, one pair."""
    settings = ["--device", "cpu", "--size", "16", "--steps", "2", "--fidelity-steps", "2", "--pairs", "1"]
    return ladder.main(["--weights", str(checkpoint), "--out", str(out), *settings, *arguments])


def test_ladder(shallow_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fidelity, "PROMPTS", fidelity.PROMPTS[:2])
    monkeypatch.setattr(common, "matmul_ceiling", lambda *_: 1e11)
    assert climb(shallow_checkpoint, tmp_path, "--opts", "channels-last,sampler=ddim,steps=1") == 0
    lines = common.read_csv(tmp_path / "ladder.csv")
    assert [line["opts"] for line in lines] == ["naive", "none", *_prefixes("channels-last", "sampler=ddim", "steps=1")]
    columns = {*ladder.SPEED_FIELDS, *ladder.FIDELITY_FIELDS, *common.environment(CPU, torch.float32), "opts", "error"}
    assert columns <= set(lines[0])
    assert all(float(line["step_s"]) > 0 and float(line["peak_gib"]) > 0 for line in lines)
    assert float(lines[1]["error_last"]) == 0  # plain fp32 is its own reference
    assert float(lines[2]["error_last"]) < 1e-4
    assert [line["exact"] for line in lines] == ["1", "1", "1", "0", "0"]
    steps = common.read_csv(tmp_path / "steps.csv")
    assert [line["step"] for line in steps if line["opts"] == "channels-last"] == ["1", "2"]
    assert "channels-last" in (tmp_path / "ladder.svg").read_text()
    assert "steps=1" in (tmp_path / "ladder-approximate.svg").read_text()
    assert "plain, drawn again" in capsys.readouterr().out

    monkeypatch.setattr(speed, "measure", lambda *_: pytest.fail("measured a row again"))
    assert climb(shallow_checkpoint, tmp_path, "--opts", "channels-last,sampler=ddim,steps=1") == 0


def _prefixes(*names: str) -> list[str]:
    return [",".join(names[: i + 1]) for i in range(len(names))]


def recompiling(patch: Patch) -> None:
    """Compiles the sampler's loop for one number of steps."""
    sample = patch.pipe.sample
    scale = torch.compile(lambda x, steps: x * steps / steps, backend="eager", dynamic=False)

    def sample_scaled(x, conditions, sampler, schedule, *more):
        return sample(scale(x, len(schedule)), conditions, sampler, schedule, *more)

    patch.around("sample", lambda sample: sample_scaled)


def test_a_recompilation_fails_the_ladder(shallow_checkpoint, tmp_path, monkeypatch, capsys):
    entry = Optimization("test-recompiling", recompiling, Stage.CALLS, exact=True, summary="")
    known = {**registry.catalog(), entry.name: entry}
    monkeypatch.setattr(registry, "catalog", lambda: known)
    monkeypatch.setattr(optimizations, "catalog", lambda: known)
    monkeypatch.setattr(common, "matmul_ceiling", lambda *_: 1e11)
    assert climb(shallow_checkpoint, tmp_path, "--opts", entry.name, "--measure", "speed") == 1
    line = common.read_csv(tmp_path / "speed.csv")[-1]
    assert line["problems"] == "1 recompilations"
    assert (line["graphs"], line["opts"]) == ("1", "test-recompiling")
    assert "1 recompilations" in capsys.readouterr().out


def test_a_row_that_crashes_fails_the_ladder_and_is_tried_again(shallow_checkpoint, tmp_path, monkeypatch):
    tried = []

    def crash(bench, row):
        tried.append(row.key)
        raise RuntimeError("the kernel is wrong; really\nat line 1")

    monkeypatch.setattr(speed, "measure", crash)
    for _ in range(2):
        assert climb(shallow_checkpoint, tmp_path, "--opts", "channels-last", "--measure", "speed") == 1
    assert tried == ["naive", "none", "channels-last"] * 2
    assert common.read_csv(tmp_path / "ladder.csv")[0]["error"] == "RuntimeError: the kernel is wrong, really"


def test_a_row_that_cannot_run_here_does_not(shallow_checkpoint, tmp_path, monkeypatch):
    def refuse(bench, row):
        raise optimizations.OptimizationError("cuda-graph needs an NVIDIA GPU")

    monkeypatch.setattr(speed, "measure", refuse)
    assert climb(shallow_checkpoint, tmp_path, "--opts", "cuda-graph", "--measure", "speed") == 0


def test_the_budget_ends_the_ladder(shallow_checkpoint, tmp_path):
    assert climb(shallow_checkpoint, tmp_path, "--measure", "speed", "--budget", "-1") == ladder.UNFINISHED
    assert common.read_csv(tmp_path / "speed.csv") == []


def test_an_unknown_optimization_is_the_users_mistake(shallow_checkpoint, tmp_path, capsys):
    assert climb(shallow_checkpoint, tmp_path, "--opts", "chanels-last") == 2
    assert "channels-last" in capsys.readouterr().err


def test_what_is_printed_is_what_the_readme_explains(monkeypatch):
    """Every column of the ladder's table stands in bench/README.md, and nothing else does."""
    section = (common.ROOT / "bench" / "README.md").read_text().partition("## The ladder\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")]
    explained = {word for cell in cells if cell != "column" for word in re.split(r"[:,] ", cell)}
    printed = []
    monkeypatch.setattr(report, "print_table", lambda title, rows: printed.extend(rows))
    columns = [*ladder.SPEED_FIELDS, *ladder.FIDELITY_FIELDS, *common.environment(CPU, torch.float32), *HELD]
    report.print_ladder([{**dict.fromkeys(columns, ""), "row": "sdpa", "opts": "none", "exact": "1", "error": ""}])
    names = {word.removesuffix(" dB") for column in printed[0] for word in column.split(": ")}
    assert explained == names - {"row", "exact"}


# ---- the gallery


def test_the_gallery_is_what_its_command_writes(tmp_path, monkeypatch):
    """All of its text, and one sheet; the others are there."""
    section = next(one for one in gallery.SECTIONS if one.name == "previews")
    tiles = [("a", Image.new("RGB", (8, 8), "red")), ("b", Image.new("RGB", (16, 8)))]
    monkeypatch.setattr(gallery, "SECTIONS", [replace(section, draw=lambda pipe: iter(tiles)), *gallery.SECTIONS[:-1]])
    assert gallery.main(["previews", "--out", str(tmp_path)]) == 0
    assert Image.open(tmp_path / "gallery" / "previews.webp").size == (2 * 16 + gallery.GAP, 8 + gallery.LABEL)
    written = (tmp_path / "gallery.md").read_text()
    there = (ROOT / "docs" / "gallery.md").read_text()
    assert sorted(written.splitlines()) == sorted(there.splitlines()), "run python bench/gallery.py"
    for one in gallery.SECTIONS:
        assert (ROOT / "docs" / "gallery" / f"{one.name}.webp").is_file()

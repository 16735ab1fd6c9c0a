"""The command line as a person types it. Most tests call `main` in this process: starting torch takes seconds."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench.reference.numbers import pixels
from bench.reference.weights import tiny_config
from sd import inference
from sd.inference import main, parse_arguments
from sd.pictures.formats import encoded
from sd.pictures.png import read_parameters, save_png
from sd.pictures.run import recalled
from sd.pipeline import StableDiffusion
from tests.weights import random_models

PROGRAM = Path(inference.__file__)
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def draw(shallow_checkpoint, tmp_path, monkeypatch, capfd):
    """Run the command line in an empty folder; returns what it printed on stdout. It must succeed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD_CKPT", str(shallow_checkpoint))

    def call(*arguments: object) -> str:
        code = main(list(map(str, arguments)))
        printed = capfd.readouterr()
        assert code == 0, printed.err
        call.errors = printed.err
        return printed.out

    return call


@pytest.fixture
def calls(monkeypatch) -> list[list[str]]:
    """The prompts of each call of `generate`: the batches."""
    batches = []
    generate = StableDiffusion.generate

    def recording(self, prompts, *args, **kwargs):
        batches.append(list(prompts))
        return generate(self, prompts, *args, **kwargs)

    monkeypatch.setattr(StableDiffusion, "generate", recording)
    return batches


def names(folder: Path = Path()) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start(*arguments: object, cwd: Path, output: int = subprocess.PIPE) -> subprocess.Popen:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=ONE_THREAD, text=True, stdout=output, stderr=output)


def run(*arguments: object, cwd: Path) -> tuple[int, str, str]:
    process = start(*arguments, cwd=cwd)
    out, errors = process.communicate(timeout=300)
    return process.returncode, out, errors


# ---- one picture


def test_a_picture_from_any_directory(tiny_checkpoint, tmp_path):
    code, out, errors = run(
        "--ckpt", tiny_checkpoint, "--prompt", "a fox", "--steps", 3, "--seed", 5, "--out", "fox.png", cwd=tmp_path
    )
    assert code == 0, errors
    with Image.open(tmp_path / "fox.png") as image:
        assert image.size == (tiny_config().image_size,) * 2
    parameters = read_parameters(tmp_path / "fox.png")
    assert parameters["prompt"] == "a fox"
    assert parameters["seed"] == 5
    assert {"negative_prompt", "steps", "cfg_scale", "sampler", "height", "width", "dtype", "model"} <= set(parameters)
    for word in ("seed 5", "load", "text", "denoise", "decode", "fox.png"):
        assert word in out
    assert "it/s" in errors
    assert names(tmp_path) == ["fox.png"]


def test_the_same_command_writes_the_same_bytes(draw):
    for name in ("a.png", "b.png", "b.png"):
        draw("--prompt", "x", "--steps", 2, "--seed", 1, "--out", name)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_a_picture_is_never_overwritten_unless_somebody_says_so(draw):
    for prompt in ("x", "y", "z"):
        draw("--prompt", prompt, "--steps", 1, "--seed", 1)
    draw("--prompt", "w", "--steps", 1, "--num-images", 2)
    drawn = {"output.png": "x", "output-1.png": "y", "output-2.png": "z", "output-3.png": "w", "output-4.png": "w"}
    assert {name: read_parameters(name)["prompt"] for name in names()} == drawn
    draw("--prompt", "v", "--steps", 1, "--out", "output.png")
    draw("--prompt", "u", "--steps", 1, "--num-images", 2, "--overwrite")
    drawn |= {"output.png": "v", "output-1.png": "u", "output-2.png": "u"}
    assert {name: read_parameters(name)["prompt"] for name in names()} == drawn
    draw("--prompt", "t", "--steps", 1, "--overwrite")
    assert read_parameters("output.png")["prompt"] == "t"


def test_help_needs_no_torch():
    code = "import sys; sys.argv = ['x', '--help']\nfrom sd.inference import main\ntry:\n    main()\nfinally:\n"
    code += "    assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROGRAM.parent.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--prompts-file" in result.stdout


def test_short_options_are_the_long_ones(draw):
    draw("-p", "x", "-n", "y", "-s", 7, "-o", "a.png", "--steps", 1)
    draw("--prompt", "x", "--negative-prompt", "y", "--seed", 7, "--out", "b.png", "--steps", 1)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_a_seed_of_minus_one_is_random(draw):
    for name in ("a.png", "b.png"):
        draw("--prompt", "x", "--steps", 1, "--seed", -1, "--out", name)
    seeds = [read_parameters(name)["seed"] for name in ("a.png", "b.png")]
    assert seeds[0] != seeds[1]
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--strength", 0.5], "--strength changes nothing without --init-image"),
        (["--mask-blur", 2], "--mask-blur changes nothing without --mask or --outpaint"),
        (["--cfg-scale", 1, "-n", "blurry"], "--negative-prompt changes nothing where --cfg-scale is 1"),
        (["-n", "blurry"], None),
    ],
)
def test_what_changes_nothing_is_said(draw, caplog, arguments, line):
    draw("--prompt", "x", "--steps", 1, *arguments)
    said = [record.getMessage() for record in caplog.records if "changes nothing" in record.getMessage()]
    assert said == ([line] if line else [])


def test_version():
    result = subprocess.run([sys.executable, PROGRAM, "--version"], capture_output=True, text=True)
    project = tomllib.loads((PROGRAM.parent.parent / "pyproject.toml").read_text())["project"]
    assert (result.returncode, result.stdout.strip()) == (0, project["version"])


# ---- several pictures


def test_pictures_of_one_prompt(draw, calls):
    out = draw("--prompt", "x", "--steps", 1, "--seed", 3, "--num-images", 3, "--batch-size", 2)
    assert names() == ["output-1.png", "output-2.png", "output-3.png"]
    assert [read_parameters(name)["seed"] for name in names()] == [3, 4, 5]
    assert calls == [["x", "x"], ["x"]]
    assert re.findall(r"output-(\d).png  seed (\d)", out) == [("1", "3"), ("2", "4"), ("3", "5")]
    assert "3/3" in draw.errors


def test_several_prompts_and_a_pattern(draw):
    Path("out").mkdir()
    pattern = "out/{index:04}-{seed}-{prompt}.png"
    draw("--prompt", "A fox!", "--prompt", "b", "--num-images", 2, "--steps", 1, "--seed", 7, "--out", pattern)
    wanted = ["0001-7-a-fox.png", "0002-8-a-fox.png", "0003-9-b.png", "0004-10-b.png"]
    assert names(Path("out")) == wanted


def test_lines_with_parameters_share_batches_where_they_can(draw, calls):
    Image.new("RGB", (16, 16), "red").save("red.png")
    lines = [
        {"prompt": "a"},
        {"prompt": "b", "sampler": "ddim"},
        {"prompt": "c", "negative_prompt": "blur", "seed": 50},
        {"prompt": "d", "width": 32},
        {"prompt": "e", "init_image": "red.png", "strength": 0.5, "num_images": 2},
        {"prompt": "f", "steps": 1},
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    draw("--prompts-file", "p.jsonl", "--steps", 2, "--out", "{index}.png", "--batch-size", 8)
    assert calls == [["a", "c"], ["b"], ["d"], ["e", "e"], ["f"]]
    found = [read_parameters(f"{i}.png") for i in range(1, 8)]
    assert [p["prompt"] for p in found] == list("abcdeef")
    assert [p["seed"] for p in found] == [0, 1, 50, 3, 4, 5, 6]
    assert [p["steps"] for p in found] == [2, 2, 2, 2, 2, 2, 1]
    assert found[2]["negative_prompt"] == "blur"
    assert Image.open("4.png").size == (32, 16)
    assert found[4]["init_image"] == "red.png"
    draw("--prompt", "c", "--negative-prompt", "blur", "--seed", 50, "--steps", 2, "--out", "alone.png")
    assert abs(pixels("alone.png") - pixels("3.png")).max() <= 1


def test_a_second_run_draws_what_is_missing(draw, calls):
    Path("p.txt").write_text("a\nb\nc\n")
    line = ["--prompts-file", "p.txt", "--steps", 1, "--out", "{prompt}-{seed}.png"]
    draw(*line)
    made = {name: os.stat(name).st_mtime_ns for name in names()}
    assert list(made) == ["a-0.png", "b-1.png", "c-2.png", "p.txt"]
    Path("b-1.png").unlink()
    calls.clear()
    draw(*line)
    assert calls == [["b"]]
    assert {**made, "b-1.png": 0} == {name: os.stat(name).st_mtime_ns for name in names()} | {"b-1.png": 0}
    assert "all 3 pictures are there" in draw(*line)
    assert calls == [["b"]]
    draw(*line, "--overwrite")
    assert sorted(prompt for batch in calls[1:] for prompt in batch) == ["a", "b", "c"]


def test_random_seeds_are_other_pictures_on_a_second_run(draw):
    for _ in range(2):
        draw("--prompt", "x", "--num-images", 2, "--steps", 1)
    assert names() == [f"output-{i}.png" for i in range(1, 5)]
    assert len({read_parameters(name)["seed"] for name in names()}) == 4


def test_random_seeds_do_not_stop_a_second_run_with_names(draw):
    line = ["--prompt", "x", "--num-images", 2, "--steps", 1, "--out", "a.png"]
    draw(*line)
    seed = read_parameters("a-1.png")["seed"]
    Path("a-2.png").unlink()
    draw(*line)
    assert names() == ["a-1.png", "a-2.png"]
    assert read_parameters("a-1.png")["seed"] == seed


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("MPS backend out of memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_batch(draw, monkeypatch, error):
    generate = StableDiffusion.generate
    sizes = []

    def small(self, prompts, *args, **kwargs):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise error
        return generate(self, prompts, *args, **kwargs)

    monkeypatch.setattr(StableDiffusion, "generate", small)
    draw("--prompt", "x", "--num-images", 5, "--steps", 1, "--batch-size", 5, "--seed", 0)
    assert sizes == [5, 2, 2, 1]
    assert names() == [f"output-{i}.png" for i in range(1, 6)]
    assert "out of memory; going on with 2 at once" in draw.errors


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from sd.inference import main
line = ["--prompt", "x", "--steps", "1", "--seed", "0", "--ckpt", sys.argv[1]]
main([*line, "--num-images", "2"])  # so that what is allocated once is
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, resource.RLIM_INFINITY))
raise SystemExit(main([*line, "--num-images", "64", "--batch-size", "64", "--out", sys.argv[2] + "/a.png"]))
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_memory_that_really_runs_out(tiny_checkpoint, tmp_path):
    command = [sys.executable, "-c", LITTLE_MEMORY, str(tiny_checkpoint), str(tmp_path)]
    environment = {**ONE_THREAD, "PYTHONPATH": str(PROGRAM.parent.parent)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "out of memory; going on with 32 at once" in result.stderr
    assert len(list(tmp_path.glob("a-*.png"))) == 64


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.full)])
def test_many_prompts_killed_midway_and_run_again(draw, shallow_checkpoint, tmp_path, monkeypatch, count):
    prompts = [f"prompt {i}" for i in range(count)]
    Path("p.txt").write_text("\n".join(prompts))
    line = ["--prompts-file", "p.txt", "--steps", 1, "--cfg-scale", 1, "--out", "{index:04}.png", "--batch-size", 4]
    process = start(*line, "--ckpt", shallow_checkpoint, cwd=tmp_path, output=subprocess.DEVNULL)
    wait_for(lambda: len(list(tmp_path.glob("*.png"))) >= count // 3, process)
    process.kill()
    process.wait()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert 0 < len(made) < count

    resident = []

    def measuring(*args):
        data = encoded(*args)
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
        return data

    monkeypatch.setattr("sd.pictures.saving.encoded", measuring)
    out = draw(*line)
    files = sorted(tmp_path.glob("*.png"))
    assert [read_parameters(file)["prompt"] for file in files] == prompts
    assert {path: path.stat().st_mtime_ns for path in made} == made
    drawn = re.findall(r"^(\d+)\.png  seed", out, re.MULTILINE)
    assert len(drawn) == len(set(drawn)) == count - len(made)
    assert resident[-1] - resident[len(resident) // 4] < 16 * 2**20
    assert f"all {count} pictures are there" in draw(*line)


# ---- a picture again


def test_from_png_is_pixel_for_pixel(draw):
    draw("--prompt", "a fox", "--negative-prompt", "blur", "--steps", 3, "--cfg-scale", 4, "--sampler", "ddim")
    draw("--from-png", "output.png", "--out", "again.png")
    assert Path("output.png").read_bytes() == Path("again.png").read_bytes()


def test_from_png_in_the_batch_that_it_was_drawn_in(draw, calls):
    draw("--prompt", "a", "--prompt", "b", "--prompt", "c", "--steps", 2, "--batch-size", 3)
    draw("--from-png", "output-2.png", "--out", "again.png")
    assert calls[1] == ["b"] * 3
    assert Path("output-2.png").read_bytes() == Path("again.png").read_bytes()


def test_from_png_with_another_size(draw):
    draw("--prompt", "x", "--steps", 1, "--width", 32)
    draw("--from-png", "output.png", "--out", "again.png")
    assert Path("output.png").read_bytes() == Path("again.png").read_bytes()


def test_from_png_takes_dtype_and_device_too_unless_they_are_given(tmp_path):
    recorded = {"prompt": "x", "dtype": "bfloat16", "device": "cpu", "ema": True, "batch": [2, 8]}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", recorded)
    run, model, _ = recalled(*parse_arguments(["--from-png", f"{tmp_path}/a.png", "--device", "cuda"]))
    assert (model.dtype, model.device, model.ema, run.place) == ("bfloat16", "cuda", True, (2, 8))
    run, _, _ = recalled(*parse_arguments(["--from-png", f"{tmp_path}/a.png", "--batch-size", "1"]))
    assert run.place is None


def test_from_png_of_a_plain_model_is_the_plain_model(tmp_path):
    """ "" is what was applied there, not something that is left open."""
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"prompt": "x", "opt": ""})
    _, model, _ = recalled(*parse_arguments(["--from-png", f"{tmp_path}/a.png"]))
    assert model.names() == ""


def test_a_seed_of_zero_is_a_seed(draw):
    draw("--prompt", "x", "--steps", 1, "--seed", 9)
    draw("--from-png", "output.png", "--seed", 0, "--out", "zero.png")
    assert read_parameters("zero.png")["seed"] == 0


def test_from_png_of_image_to_image(draw, tmp_path):
    Image.linear_gradient("L").save("init.png")
    draw("--prompt", "x", "--steps", 4, "--init-image", "init.png", "--strength", 0.5)
    draw("--from-png", "output.png", "--out", "again.png")
    assert Path("output.png").read_bytes() == Path("again.png").read_bytes()


def test_from_png_with_changes(draw):
    draw("--prompt", "x", "--steps", 2, "--seed", 1)
    draw("--from-png", "output.png", "--seed", 2, "--prompt", "y", "--steps", 1, "--num-images", 2, "--out", "b.png")
    found = [read_parameters(f"b-{i}.png") for i in (1, 2)]
    assert [(p["prompt"], p["seed"], p["steps"]) for p in found] == [("y", 2, 1), ("y", 3, 1)]


def test_from_png_finds_its_checkpoint_or_says_which(draw, tmp_path, monkeypatch, capfd):
    config = tiny_config()
    other = tmp_path / "other.safetensors"
    StableDiffusion(config, *random_models(config, seed=1)).save(other)
    draw("--prompt", "x", "--steps", 1, "--ckpt", other)
    assert main(["--from-png", "output.png", "--out", "again.png"]) == 2
    assert "drawn with the checkpoint other.safetensors" in capfd.readouterr().err
    monkeypatch.setattr("sd.pipeline.DATA", tmp_path)
    draw("--from-png", "output.png", "--out", "again.png")
    assert Path("output.png").read_bytes() == Path("again.png").read_bytes()


# ---- optimizations


def test_optimizations_are_applied_recorded_and_recalled(draw):
    draw("--prompt", "x", "--steps", 2, "--opt", "kv-cache,deepcache=2", "--attention", "math")
    assert read_parameters("output.png")["opt"] == "attention=math,deepcache=2,kv-cache"
    draw("--from-png", "output.png", "--out", "again.png")
    assert Path("output.png").read_bytes() == Path("again.png").read_bytes()


def test_what_runs_is_explained(draw):
    out = draw("--explain", "--opt", "kv-cache")
    assert re.search(r"^unet\.middle_block.*attn2 +keys and values once a prompt.* kv-cache$", out, re.MULTILINE)
    assert names() == []
    assert draw("--explain", "--opt", "kv-cache", "--prompt", "x", "--steps", 1).startswith(
        out.rpartition("\nimport")[0]
    )
    assert names() == ["output.png"]


def test_optimizations_are_listed(draw):
    out = draw("--list-opts")
    assert re.search(r"^  deepcache +approx\.  .* =N: deep levels", out, re.MULTILINE)


def test_quantized_weights_are_saved_and_loaded(draw):
    draw("--save-quantized", "q.safetensors", "--opt", "int8-weights")
    assert names() == ["q.safetensors"]
    line = ["--prompt", "x", "--steps", 2, "--seed", 0]
    draw(*line, "--opt", "int8-weights", "--out", "a.png")
    draw(*line, "--load-quantized", "q.safetensors", "--out", "b.png")
    assert (pixels("a.png") == pixels("b.png")).all()
    draw("--from-png", "b.png", "--load-quantized", "q.safetensors", "--out", "c.png")
    assert Path("b.png").read_bytes() == Path("c.png").read_bytes()


# ---- stopped


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def interrupted(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.endswith("interrupted\n")


def loaded(process: subprocess.Popen, library: str) -> bool:
    return library in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("moment", ["libtorch_cpu", "tiny.safetensors"])
def test_interrupt_while_importing_and_loading(tiny_checkpoint, tmp_path, moment):
    process = start("--ckpt", tiny_checkpoint, "--prompt", "x", "--steps", 1000, cwd=tmp_path)
    wait_for(lambda: loaded(process, moment), process)
    interrupted(process)
    assert names(tmp_path) == []


def test_interrupt_while_drawing(tiny_checkpoint, tmp_path):
    process = start("--ckpt", tiny_checkpoint, "--prompt", "x", "--steps", 1000, cwd=tmp_path)
    assert "denoise" in process.stderr.read(20)
    interrupted(process)
    assert names(tmp_path) == []


@pytest.mark.full
@pytest.mark.parametrize("tenths", range(2, 40, 2))
def test_interrupt_at_any_moment(tiny_checkpoint, tmp_path, tenths):
    process = start("--ckpt", tiny_checkpoint, "--prompt", "x", "--steps", 1000, cwd=tmp_path)
    time.sleep(tenths / 10)
    interrupted(process)
    assert names(tmp_path) == []

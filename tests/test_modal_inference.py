"""modal_inference.py through the real client and the real container entry point: one picture, and what goes wrong."""

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from unittest.mock import MagicMock

import modal
import pytest
import torch
from modal_proto import api_pb2
from PIL import Image
from safetensors.torch import save_file

import modal_inference
from bench.reference.numbers import pixels
from bench.reference.weights import random_controlnet
from sd.pictures.parameters import PARAMETERS, Number, Parameter
from sd.pictures.png import read_parameters, save_png
from sd.pictures.png_text import png_parameters
from sd.pipeline import DEMO_CHECKPOINT, StableDiffusion
from tests.modal_fixtures import drawn_here
from tests.modal_loopback.containers import namespaces_allowed

pytest_plugins = ["tests.modal_fixtures"]

ROOT = Path(modal_inference.__file__).parent
CHECKPOINT = modal_inference.CHECKPOINT
DRAW = ["--prompt", "a red apple", "--negative-prompt", "-dark", "--steps", 3, "--seed", 5]


@pytest.mark.full(memory=False)
def test_one_picture(filled, checkpoint, tmp_path):
    result = filled.run("run", "modal_inference.py", *DRAW)
    assert result.code == 0, result.text
    assert "denoise" in result.text  # its progress
    assert "output.png  seed 5" in result.out
    assert os.listdir(filled.cwd) == ["output.png"]
    drawn_here(tmp_path / "local.png", checkpoint, *DRAW[:2], "--negative-prompt=-dark", *DRAW[4:])
    assert (pixels(filled.cwd / "output.png") == pixels(tmp_path / "local.png")).all()
    assert read_parameters(filled.cwd / "output.png") == read_parameters(tmp_path / "local.png")
    assert [task.function for task in filled.plane.tasks.values()] == [filled.plane.function("infer")]
    check_request(filled.plane)
    check_uploads(filled.plane)


def check_request(plane) -> None:
    """What the client asked Modal for."""
    for name in ("infer", "Model.*", "Service.*"):
        asked = plane.function(name).definition
        assert (asked.resources.gpu_config.gpu_type, asked.resources.gpu_config.count) == ("A10", 1)
        assert asked.retry_policy.retries == 0
        mounts = {mount.mount_path: (mount.volume_id, mount.read_only) for mount in asked.volume_mounts}
        assert mounts == {"/root/weights": ("vo-sd-weights", True), "/root/cache": ("vo-sd-cache", False)}
    assert plane.function("infer").definition.timeout_secs == 1800
    assert plane.function("Model.*").definition.timeout_secs == 600
    assert not plane.function("infer").definition.checkpointing_enabled
    assert plane.function("Service.*").definition.checkpointing_enabled
    assert plane.function("Service.*").definition.concurrency_limit == 1
    commands = plane.image_commands(plane.function("infer"))
    order = ["FROM ", "build-essential", "uv pip install", "import triton", "ENV "]
    assert any("uv pip install" in command and modal_inference.TRITON in command for command in commands)
    places = [next(i for i, command in enumerate(commands) if text in command) for text in order]
    assert places == sorted(places), commands
    assert "3.11" in commands[0]
    assert "/root/cache/inductor" in " ".join(commands)
    context = [file for image in plane.images.values() for file in image.context_files]
    assert (ROOT / "requirements.txt").read_bytes() in [file.data for file in context]


def check_uploads(plane) -> None:
    """The program, the tokenizer and the demo model; none of the checkpoints that lie about."""
    found = plane.uploaded(plane.function("infer"))
    under_root = {path for path in found if path.startswith("/root/")}
    data = {path for path in under_root if path.startswith("/root/data/")}
    demo = {path.name for path in (ROOT / "data/demo").iterdir() if path.suffix in (".safetensors", ".json")}
    assert data == {"/root/data/vocab.json", "/root/data/merges.txt", *(f"/root/data/demo/{name}" for name in demo)}
    program = {path for path in under_root - data if path.startswith("/root/sd/")}
    assert {"/root/sd/pipeline.py", "/root/sd/optimizations/quantize_filter.json"} <= program
    assert {"/root/sd/kernels/cpp/linear.cpp", "/root/sd/kernels/cpp/simd.h"} <= program
    assert {
        "/root/sd/pictures/parameters.py",
        "/root/sd/service/page/page.html",
        "/root/sd/service/page/main.js",
    } <= program
    assert all(path.endswith((".py", ".html", ".css", ".js", ".cpp", ".h", ".json")) for path in program)
    assert under_root - data - program == {"/root/modal_inference.py", "/root/modal_infer.sh"}
    assert found["/root/modal_infer.sh"][1] & 0o111


@pytest.mark.full(memory=False)
def test_several_pictures_of_the_demo_model(loopback):
    arguments = ["--prompt", "a fox", "--steps", 1, "--seed", 1, "--num-images", 2, "--ckpt", "demo"]
    result = loopback.run("run", "modal_inference.py", *arguments, "--opt", "none")
    assert result.code == 0, result.text
    assert sorted(os.listdir(loopback.cwd)) == ["output-1.png", "output-2.png"]
    assert [read_parameters(loopback.cwd / f"output-{i}.png")["seed"] for i in (1, 2)] == [1, 2]


@pytest.fixture
def lora(tmp_path) -> Path:
    """A LoRA for two of the demo model's layers, strong enough to be seen."""
    generator = torch.Generator().manual_seed(3)
    weights = StableDiffusion.load(DEMO_CHECKPOINT, "cpu").unet.state_dict()
    found = {}
    for name in [name for name in weights if name.endswith("attn2.to_q.weight")][:2]:
        rows, columns = weights[name].shape
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        found[f"{key}.lora_down.weight"] = torch.randn(4, columns, generator=generator)
        found[f"{key}.lora_up.weight"] = torch.randn(rows, 4, generator=generator)
    save_file(found, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


@pytest.fixture
def vae(tmp_path) -> Path:
    """An autoencoder that is not the demo model's: its last layer turned about."""
    weights = StableDiffusion.load(DEMO_CHECKPOINT, "cpu").vae.state_dict()
    weights["decoder.conv_out.weight"] = -weights["decoder.conv_out.weight"]
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "vae.safetensors")
    return tmp_path / "vae.safetensors"


@pytest.mark.full(memory=False)
def test_an_autoencoder_of_this_machine(loopback, vae, tmp_path):
    draw = ["--prompt", "a red apple", "--steps", 2, "--seed", 5, "--opt", "none", "--vae", vae]
    result = loopback.run("run", "modal_inference.py", *draw, "--ckpt", "demo", SD_GPU="none")
    assert result.code == 0, result.text
    drawn_here(tmp_path / "with.png", DEMO_CHECKPOINT, *draw)
    drawn_here(tmp_path / "without.png", DEMO_CHECKPOINT, *draw[:-2])
    assert (pixels(loopback.cwd / "output.png") == pixels(tmp_path / "with.png")).all()
    assert (pixels(tmp_path / "with.png") != pixels(tmp_path / "without.png")).any()
    assert read_parameters(loopback.cwd / "output.png") == read_parameters(tmp_path / "with.png")


@pytest.mark.full(memory=False)
def test_a_lora_of_this_machine_is_sent_once(loopback, lora, tmp_path):
    """One prompt and a prompts file draw with it, pixel for pixel as here, and it goes to the volume a single time."""
    draw = ["--prompt", "a red apple", "--steps", 2, "--seed", 5, "--opt", "none", "--lora", f"{lora}:0.7"]
    result = loopback.run("run", "modal_inference.py", *draw, "--ckpt", "demo", SD_GPU="none")
    assert result.code == 0, result.text
    assert "sending style.safetensors" in result.out
    drawn_here(tmp_path / "with.png", DEMO_CHECKPOINT, *draw)
    drawn_here(tmp_path / "without.png", DEMO_CHECKPOINT, *draw[:-2])
    assert (pixels(loopback.cwd / "output.png") == pixels(tmp_path / "with.png")).all()
    assert (pixels(tmp_path / "with.png") != pixels(tmp_path / "without.png")).any()
    assert read_parameters(loopback.cwd / "output.png") == read_parameters(tmp_path / "with.png")

    (loopback.cwd / "p.jsonl").write_text('{"prompt": "a red apple", "steps": 2, "seed": 5}')
    many = ["--prompts-file", "p.jsonl", "--opt", "none", "--ckpt", "demo"]
    result = loopback.run("run", "modal_inference.py", *many, "--lora", f"{lora}:0.7", SD_GPU="none")
    assert result.code == 0, result.text
    assert (pixels(loopback.cwd / "pictures/00001-5.png") == pixels(tmp_path / "with.png")).all()
    assert loopback.plane.sent == [f"files/{sha256(lora.read_bytes()).hexdigest()[:16]}/style.safetensors"]
    tasks = len(loopback.plane.tasks)
    result = loopback.run("run", "modal_inference.py", *many, "--lora", f"{lora}:0.8", SD_GPU="none")
    one_line_error(result, "00001-5.png is there and is another picture (its loras")
    assert len(loopback.plane.tasks) == tasks


@pytest.fixture
def photo(loopback) -> Path:
    """A picture and a mask in the folder where `modal` is typed, and one of the same name elsewhere; a ControlNet."""
    (loopback.cwd / "in").mkdir()
    across = Image.radial_gradient("L").resize((128, 128))
    across.convert("RGB").save(loopback.cwd / "in/photo.png")
    across.point(lambda x: 255 * (x < 128)).save(loopback.cwd / "mask.png")
    (loopback.cwd.parent / "other").mkdir()
    across.rotate(90).transpose(Image.Transpose.FLIP_LEFT_RIGHT).convert("RGB").save(
        loopback.cwd.parent / "other/mask.png"
    )
    net = random_controlnet(StableDiffusion.load(DEMO_CHECKPOINT, "cpu").config)
    save_file(net.half().state_dict(), loopback.cwd / "net.safetensors")
    return loopback.cwd / "in/photo.png"


@pytest.mark.full(memory=False)
def test_a_picture_a_mask_and_a_controlnet_of_this_machine(loopback, photo, tmp_path, monkeypatch):
    """One prompt and a prompts file draw after them, as here, and what was typed is what the PNG says."""
    edit = ["--init-image", "in/photo.png", "--mask", "mask.png", "--mask-invert", "--strength", 0.7]
    hint = f"net.safetensors:{loopback.cwd.parent}/other/mask.png:0.5"
    draw = ["--prompt", "a red apple", "--steps", 3, "--seed", 5, "--opt", "none", *edit, "--control", hint]
    draw += ["--control-preprocess", "canny"]
    result = loopback.run("run", "modal_inference.py", *draw, "--ckpt", "demo", SD_GPU="none")
    assert result.code == 0, result.text
    monkeypatch.chdir(loopback.cwd)
    drawn_here(tmp_path / "with.png", DEMO_CHECKPOINT, *draw)
    drawn_here(tmp_path / "without.png", DEMO_CHECKPOINT, *draw[:-4])
    assert (pixels(loopback.cwd / "output.png") == pixels(tmp_path / "with.png")).all()
    assert (pixels(tmp_path / "with.png") != pixels(tmp_path / "without.png")).any()
    there, here = read_parameters(loopback.cwd / "output.png"), read_parameters(tmp_path / "with.png")
    (control,), (typed,) = there.pop("control"), here.pop("control")
    assert there == here
    assert there["init_image"] == "in/photo.png"
    digest = sha256((loopback.cwd.parent / "other/mask.png").read_bytes()).hexdigest()
    assert re.fullmatch(r"net.safetensors:[0-9a-f]{12}/mask.png:0.5:0-1", control)
    assert typed == hint
    assert f"files/{digest[:16]}/mask.png" in loopback.plane.sent
    sent = len(loopback.plane.sent)

    lines = [{"prompt": "a red apple", "steps": 3, "seed": 5, "control": hint, "control_preprocess": "canny"}] * 2
    lines[0] = lines[0] | {"init_image": "in/photo.png", "mask": "mask.png", "mask_invert": True, "strength": 0.7}
    (loopback.cwd / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    many = ["--prompts-file", "p.jsonl", "--opt", "none", "--ckpt", "demo"]
    result = loopback.run("run", "modal_inference.py", *many, SD_GPU="none")
    assert result.code == 0, result.text
    assert (pixels(loopback.cwd / "pictures/00001-5.png") == pixels(tmp_path / "with.png")).all()
    drawn_here(tmp_path / "hinted.png", DEMO_CHECKPOINT, *draw[:8], *draw[-4:])
    assert (pixels(loopback.cwd / "pictures/00002-5.png") == pixels(tmp_path / "hinted.png")).all()
    assert len(loopback.plane.sent) == sent
    again = loopback.run("run", "modal_inference.py", *many, SD_GPU="none")
    assert "all pictures are there already" in again.out, again.text


def test_files_that_are_sent_are_told_apart_by_content(tmp_path, monkeypatch, capsys):
    """Two of one name, one of them there already, with and without a strength; and how the container finds them."""
    (tmp_path / "other").mkdir()
    first, second = tmp_path / "a.pt", tmp_path / "other" / "a.pt"
    first.write_bytes(b"one")
    second.write_bytes(b"two")
    names = [f"files/{sha256(content).hexdigest()[:16]}/a.pt" for content in (b"one", b"two")]
    batch = MagicMock()
    monkeypatch.setattr(modal_inference.weights, "batch_upload", batch)
    choice = modal_inference.named_files(
        {"lora": f"{first}:0.5,{second}", "embedding": f"{second}:word", "vae": str(first)}
    )
    said, links = modal_inference.sent(choice, {"x/photo.png": second}, {names[0]})
    (call,) = batch.return_value.__enter__.return_value.put_file.call_args_list
    assert call.args == (second, f"/{names[1]}")
    assert capsys.readouterr().out == "sending a.pt\n"
    weights = f"{ROOT}/weights"
    found = {"lora": [f"{weights}/{names[0]}:0.5", f"{weights}/{names[1]}:1.0"]}
    found |= {"embedding": [f"{weights}/{names[1]}:word"], "vae": [f"{weights}/{names[0]}"]}
    assert modal_inference.in_container(said) == found
    assert modal_inference.choice_of(found).vae == Path(f"{weights}/{names[0]}")
    assert links == {"x/photo.png": names[1]}
    assert modal_inference.sent(modal_inference.named_files({"lora": None}), {}, set()) == ("", {})


# ---- mistakes


def one_line_error(result, words: str) -> None:
    """Exit code 2, one line on stderr that says what is wrong, no traceback."""
    assert result.code == 2, result.text
    assert "Traceback" not in result.text
    assert re.fullmatch(r"error: [^\n]*\n", result.errors), result.text
    assert words in result.errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--prompt TEXT or --prompts-file FILE"),
        (["--prompt", "x"], "modal run modal_volume.py"),
        (["--prompt", "x", "--gpu", "A11"], "no GPU 'A11'; is it 'A10'? there are T4"),
        (["--prompt", "x", "--steps", 1001], "steps must be from 1 to 1000, not 1001"),
        (["--prompts-file", "missing.jsonl"], "missing.jsonl cannot be read"),
    ],
)
@pytest.mark.full(memory=False)
def test_mistakes_are_one_line_and_start_nothing(loopback, arguments, words):
    one_line_error(loopback.run("run", "modal_inference.py", *arguments), words)
    assert loopback.plane.tasks == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": "x", "prompts_file": "p.txt"}, "one of them"),
        ({"prompt": "x", "opt": "exakt"}, "is it 'exact'?"),
        ({"prompt": "x", "out": "/dev/null/x.png"}, "/dev/null is no folder"),
        ({"prompt": "x", "out": "x.jpg"}, "must end in .png"),
        ({"prompt": "x", "out": "pictures/00001-0.png"}, "00001-0.png is there, and no picture of this program"),
        ({"prompt": "x", "num_images": 17}, "at most 16"),
        ({"prompt": "x", "seed": -1}, "seed must be from 0"),
        ({"prompt": "x", "sampler": "magic"}, "no sampler 'magic'"),
        ({"prompt": "x", "max_containers": 0}, "at least 1"),
        ({"prompt": "x", "opt": "float8"}, "float8 needs an NVIDIA GPU with sm89 or newer; this is A10 (sm86)"),
        ({"prompt": "x", "opt": "exact,bf16", "gpu": "t4"}, "bf16 needs an NVIDIA GPU with sm80 or newer; this is T4"),
        ({"prompt": "x", "opt": "cpu-linear", "gpu": "H100"}, "cpu-linear needs a CPU; this is H100 (sm90)"),
        (
            {"prompt": "x", "lora": "there.safetensors,gone.safetensors:0.5"},
            "--lora: there is no file gone.safetensors",
        ),
        ({"prompt": "x", "embedding": "gone.pt:word"}, "--embedding: there is no file gone.pt"),
        ({"prompts_file": "bad.jsonl"}, "bad.jsonl line 2: steps"),
        ({"prompts_file": "image.jsonl"}, "image.jsonl line 1: there is no file a.png"),
        ({"prompts_file": "control.jsonl"}, "control.jsonl line 1: there is no file n.safetensors"),
        ({"prompt": "x", "init_image": "gone.png"}, "--init-image: there is no file gone.png"),
        ({"prompt": "x", "init_image": "pictures"}, "--init-image: there is no file pictures"),
        ({"prompt": "x", "mask": "other.txt"}, "mask says which part of a picture is drawn anew"),
        ({"prompt": "x", "control": "other.txt:other.txt,other.txt:gone.png"}, "--control: there is no file gone.png"),
        ({"prompt": "x", "control": "other.txt"}, "--control: control must be FILE:PICTURE"),
        ({"prompt": "x", "control_preprocess": "canny,edges"}, "no control_preprocess 'edges'"),
        ({"prompts_file": "other.txt"}, "is another picture"),
        ({"prompt": "x", "vae": "missing.pt"}, "--vae: there is no file missing.pt"),
        ({"prompt": "x", "vae": "pictures"}, "--vae: pictures is a folder; name the file in it"),
    ],
)
def test_more_mistakes(tmp_path, monkeypatch, capsys, arguments, words):
    """The entry point itself, which has nothing to ask anybody before it finds these."""
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "steps": 0}\n')
    Path("image.jsonl").write_text('{"prompt": "x", "init_image": "a.png"}\n')
    Path("control.jsonl").write_text('{"prompt": "x", "control": "n.safetensors:a.png"}\n')
    Path("there.safetensors").write_bytes(b"")
    Path("other.txt").write_text("a fox\n")
    Path("pictures").mkdir()
    Path("pictures/00001-0.png").write_bytes(b"somebody's")
    with pytest.raises(SystemExit) as left:
        modal_inference.main.info.raw_f(**arguments)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert Path("pictures/00001-0.png").read_bytes() == b"somebody's"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"SD_GPU": "A11"}, "no GPU 'A11'"),
        ({"SD_AUTH": "none"}, 'SD_AUTH must be "proxy" or "basic"'),
        ({"SD_GPU": "T4", "SD_OPT": "fused-norm"}, "fused-norm needs an NVIDIA GPU with sm80 or newer; this is T4"),
        ({"SD_GPU": "none", "SD_OPT": "loop-graph"}, "loop-graph needs an NVIDIA GPU; this is a container without"),
    ],
)
def test_wrong_settings(loopback, environment, words):
    one_line_error(loopback.run("deploy", "modal_inference.py", **environment), words)
    assert loopback.plane.functions == {}


@pytest.mark.full(memory=False)
def test_a_failure_in_the_container(filled):
    """A checkpoint that is cut off, which only the container can see."""
    broken = filled.plane.volume("sd-weights") / "broken.safetensors"
    broken.write_bytes(b"not a checkpoint")
    result = filled.run("run", "modal_inference.py", "--prompt", "x", "--ckpt", broken.name, "--gpu", "h100")
    one_line_error(result, "broken.safetensors")
    (variant,) = filled.plane.variants("infer")
    assert variant.definition.resources.gpu_config.gpu_type == "H100"
    (task,) = filled.plane.tasks.values()
    assert len(task.inputs) == 1  # and it is not tried again
    assert os.listdir(filled.cwd) == []


@pytest.fixture
def script(repository) -> Iterator[Callable[[str], None]]:
    """script(text): a program in the place of modal_infer.sh, through the same mounts."""
    program = repository / "modal_infer.sh"
    before = program.read_bytes()
    yield lambda text: program.write_text(f"#!/bin/sh\n{text}\n")
    program.write_bytes(before)


def test_the_cache_is_committed_when_it_has_changed(filled, script):
    """What a container compiles is there for the next one; one that compiled nothing commits nothing."""
    compiled = []
    for text in ("echo one", "echo one", "echo two!"):  # a new file, nothing, another content
        script(f"cd $(dirname $0)/cache; {text} > new; cmp -s new kernel && rm new || mv new kernel")
        filled.run("run", "modal_inference.py", "--prompt", "x", "--steps", 1)
        compiled.append(len(filled.plane.commits))
    assert filled.plane.commits == ["vo-sd-cache"] * 2, compiled
    assert compiled == [1, 1, 2]


@pytest.mark.full(memory=False)
def test_weights_cannot_be_written_in_the_container(filled, script):
    if not namespaces_allowed():
        pytest.skip("mount namespaces are not allowed here")
    script(
        """exec python -c "import os; print(os.access('/root/weights', os.W_OK), os.access('/root/cache', os.W_OK))\""""
    )
    result = filled.run("run", "modal_inference.py", "--prompt", "x", "--steps", 1)
    assert "False True" in result.out


# ---- modal_infer.sh by itself


@pytest.mark.full(memory=False)
def test_the_script_on_any_machine(checkpoint, tmp_path):
    """Laid out like a container, found through the environment; all flags are passed on."""
    (tmp_path / "weights").mkdir()
    os.link(checkpoint, tmp_path / "weights" / CHECKPOINT)
    for name in ("sd", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "SD_ROOT": str(tmp_path), "SD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment.pop("SD_CKPT", None)
    command = [str(ROOT / "modal_infer.sh"), "--prompt", "a cat", "--steps", "1", "--out", "cat.png"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert read_parameters(tmp_path / "cat.png")["checkpoint"] == CHECKPOINT
    result = subprocess.run([*command, "--steps", "0"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "steps must be from 1" in result.stderr


# ---- parts that need no loopback


def test_the_client_needs_no_torch():
    """Of requirements.txt nothing but modal is imported where `modal run` is typed; and it starts quickly."""
    code = "import sys, modal_inference, modal_volume; print(sorted(set(sys.modules) & {*sys.argv[1:]}))"
    packages = ["torch", "torchao", "numpy", "PIL", "tqdm", "tokenizers", "safetensors", "fastapi", "uvicorn"]
    result = subprocess.run([sys.executable, "-c", code, *packages], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def flags_of(function) -> dict[str, tuple[object, object]]:
    """Name -> type and default of the flags that Modal makes of an entry point."""
    return {name: (one.annotation, one.default) for name, one in inspect.signature(function).parameters.items()}


def test_the_flags_are_those_of_the_table():
    """All of them; and what is not named is the library's default."""
    flags = flags_of(modal_inference.main.info.raw_f)
    of_pictures = {name: (one.check.kind | None, None) for name, one in PARAMETERS.items()}
    assert of_pictures.items() <= flags.items()
    assert {name: flags[name] for name in modal_inference.FILES} == dict.fromkeys(
        ("lora", "embedding", "vae"), (str | None, None)
    )
    assert "given" not in flags
    assert flags["opt"][1] == modal_inference.read_settings({})["SD_OPT"] == "default"


def test_a_new_parameter_is_a_flag_and_reaches_the_container(monkeypatch, tmp_path):
    class Function:
        @staticmethod
        def remote(ckpt: str, flags: list[str], files: str, links: dict[str, str]) -> tuple[list[bytes], str]:
            asked.extend(flags)
            return [b"png"], ""

    monkeypatch.setitem(PARAMETERS, "wobble", Parameter("wobble", Number(0, 2), "how much noise", 0.5))
    assert flags_of(modal_inference.with_parameters(lambda **given: None))["wobble"] == (float | None, None)
    asked: list[str] = []
    pictures, _ = modal_inference.plan_prompt("-x", {"seed": 3, "wobble": 1.5}, f"{tmp_path}/a.png")
    modal_inference.draw_prompt(pictures, Function, "demo", "default", "", {})
    wanted = ["--prompt=-x", "--negative-prompt=", "--steps=50", "--cfg-scale=7.5", "--seed=3", "--sampler=ddpm"]
    assert asked == [*wanted, "--num-images=1", "--wobble=1.5", "--opt=default"]
    assert (tmp_path / "a.png").read_bytes() == b"png"


def test_a_png_is_read_without_pillow(tmp_path):
    parameters = {"prompt": "ä fox\n", "steps": 3, "seed": 2**62, "cfg_scale": 7.5, "batch": [0, 1]}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "x.png", parameters)
    assert png_parameters(tmp_path / "x.png") == parameters == read_parameters(tmp_path / "x.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "y.png")
    (tmp_path / "z.png").write_bytes(b"no")
    for name in ("y.png", "z.png"):
        with pytest.raises(ValueError, match=name):
            png_parameters(tmp_path / name)


def test_the_wire_is_that_of_the_pinned_modal():
    assert f"modal=={modal.__version__}" in (ROOT / "requirements.txt").read_text().split()
    assert api_pb2.Function.DESCRIPTOR.fields_by_name["method_definitions"]

"""A checkpoint that is cut, or written over, while its weights are mapped: one line, not a bus error."""

import http.client
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

from bench.reference.weights import TINY, random_controlnet, random_models, tiny_config, write_safetensors
from sd import inference
from sd.checkpoints import mapped, shrinking
from sd.controlnet import Control
from sd.model_loader import CheckpointError
from sd.pictures.drawing import draw_batch
from sd.pictures.plan import plan
from sd.pictures.prompts_file import Entry
from sd.pipeline import StableDiffusion
from tests.checkpoints.common import ROOT
from tests.weights import tiny_pipeline

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells of it by SIGBUS")


@pytest.fixture
def checkpoint(tmp_path, tiny_checkpoint) -> Path:
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(Path(tiny_checkpoint).read_bytes())
    return copy


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(4096)


def test_the_command_ends_in_one_line(checkpoint, tmp_path):
    """Cut after the first picture of many has been written."""
    command = [sys.executable, str(ROOT / "sd" / "inference.py"), "--ckpt", str(checkpoint), "--prompt", "a fox"]
    command += ["--steps", "2", "--num-images", "10000", "--opt", "none", "--out", str(tmp_path / "{index}.png")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdout.readline().startswith(str(tmp_path / "1.png"))
        cut(checkpoint)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 2, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    # Seen when a picture begins, or in the middle of one.
    assert re.match(rf"error: {checkpoint}(: was written to| became shorter) while it was in use", line)
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("*part*"))


CONVERT = """
import os, runpy, sys
from sd import model_loader
read = model_loader.read
def then_cut(path, **given):
    result = read(path, **given)
    os.truncate(path, 4096)
    return result
model_loader.read = then_cut
runpy.run_module("sd.convert", run_name="__main__")
"""


@pytest.mark.parametrize("target", ["new.safetensors", "folder"])
def test_the_converter_ends_in_one_line(checkpoint, tmp_path, target):
    command = [sys.executable, "-c", CONVERT, str(checkpoint), str(tmp_path / target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done
    # Named by who touched it, or by the system, which would not write from there.
    assert re.fullmatch(r"error: .*( became shorter while it was in use .*|Bad address.*)\n", done.stderr)
    assert not (tmp_path / target).exists()


def test_a_controlnet_that_is_written_over_is_seen_before_a_picture(tmp_path):
    file = tmp_path / "net.safetensors"
    save_file(random_controlnet(TINY).state_dict(), file)
    pipe = tiny_pipeline()
    control = [Control(pipe.add_control(file), Image.new("RGB", (64, 64)))]
    content = file.read_bytes()
    pipe.generate("x", steps=1, control=control)
    file.write_bytes(content)  # in place: the same inode
    with pytest.raises(CheckpointError, match=f"{file}: was written to while it was in use; load it again"):
        pipe.generate("x", steps=1, control=control)
    pipe.generate("x", steps=1)


SERVE = """
import os, sys
from functools import partial
from sd import serve
from sd.checkpoints.shrinking import on_bus_error
from sd.service import app, server
from sd.model_loader import Source
if sys.argv[2] == "in the middle":
    Source.check_unwritten = lambda source: None
sys.argv = ["serve.py", "--port", "0", "--device", "cpu", "--opt", "none", "--ckpt", sys.argv[1]]
serve.__name__ = "__main__"
sys.exit(serve.main())
"""


@pytest.mark.parametrize("when", ["before a picture", "in the middle"])
def test_the_service_answers_and_ends(checkpoint, when):
    """A parked thread keeps neither the client that it drew for, nor one that waits, nor the end."""
    command = [sys.executable, "-c", SERVE, str(checkpoint), when]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        port = int(re.search(r":(\d+)/", process.stdout.readline())[1])
        assert ask(port, steps=1)[0] == 200
        cut(checkpoint)
        answers: list[tuple[int, dict]] = []
        clients = [threading.Thread(target=lambda: answers.append(ask(port, steps=150))) for _ in range(3)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(60)
        _, errors = process.communicate(timeout=300)
    assert [status for status, _ in answers if status != 503] == [], answers
    assert any("the server has lost its weights" in said["error"] for _, said in answers)
    assert process.returncode == 2, errors
    assert ("became shorter" if when == "in the middle" else "was written to") + " while it was in use" in errors
    assert "Traceback" not in errors


def ask(port: int, steps: int) -> tuple[int, dict]:
    """503 also for a server that is gone already, for a client that came late."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        client.request(
            "POST", "/generate", json.dumps({"prompt": "x", "steps": steps}), {"Content-Type": "application/json"}
        )
        answer = client.getresponse()
        body = answer.read()
        return answer.status, json.loads(body) if answer.status != 200 else {}
    except ConnectionError:
        return 503, {"error": "gone"}


def test_a_file_that_is_written_over_is_seen_before_a_picture(checkpoint):
    pipe = StableDiffusion.load(checkpoint, "cpu")
    (job,) = plan([Entry("", {"prompt": "x", "steps": 1})], {}, 0)
    draw_batch(pipe, [job])
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content)  # in place: the same inode
    with pytest.raises(CheckpointError, match="was written to while it was in use; load it again"):
        draw_batch(pipe, [job])
    pipe = StableDiffusion.load(checkpoint, "cpu")
    mapped.into_memory(p for model in (pipe.clip, pipe.unet, pipe.vae) for p in model.parameters())
    checkpoint.write_bytes(content)
    draw_batch(pipe, [job])  # nothing of it is mapped any more


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_file_that_goes_as_a_whole_stays_for_who_has_it_mapped(checkpoint, how, tmp_path):
    pipe = StableDiffusion.load(checkpoint, "cpu")
    (job,) = plan([Entry("", {"prompt": "x", "steps": 1})], {}, 0)
    (before,) = draw_batch(pipe, [job])
    if how == "removed":
        checkpoint.unlink()
    else:
        (tmp_path / "new").write_bytes(b"another")
        (tmp_path / "new").replace(checkpoint)
    (after,) = draw_batch(pipe, [job])
    assert before.tobytes() == after.tobytes()
    assert shrinking.shrunk_files() == []


def test_which_file_became_shorter(tmp_path):
    path = tmp_path / "large.safetensors"
    write_safetensors(path, random_models(tiny_config()))
    pipe = StableDiffusion.load(path, "cpu")
    assert shrinking.shrunk_files() == []
    cut(path)
    assert set(shrinking.shrunk_files()) == {path}
    assert pipe.source is not None


def test_the_line_is_one_line(capfd, monkeypatch):
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    inference.leave_at_once("a\x1b[31m\nname")
    assert codes == [2]
    assert capfd.readouterr().err == "\nerror: a [31m name\n"

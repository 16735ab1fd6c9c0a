"""The service through real sockets: uvicorn on a loopback port in this process, http.client on the other side.

Pictures come from a small model; where requests queue up or leave, from a stand-in that waits for the test.
"""

import base64
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sd import inference, serve
from sd.pictures.model import ModelChoice
from sd.pictures.parameters import UserError
from sd.pictures.png import read_parameters
from sd.service import worker
from sd.service.access import BasicAuth, Lockout, auth_from_env, host_name
from sd.service.answers import answer_type
from sd.service.app import create_app
from sd.service.orders import Limits, limits_from_env
from sd.service.worker import ENDING
from tests.service.support import JSON, NDJSON, PNG, Client, WaitingPipe, event, serving, started

PROGRAM = Path(serve.__file__)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    _, _, model = serve.parse_arguments(["--ckpt", str(tiny_checkpoint), "--device", "cpu"])
    assert model == ModelChoice(ckpt=tiny_checkpoint, device="cpu")
    pipe = model.load(tiny_checkpoint)
    return pipe, model.facts(pipe, tiny_checkpoint)


@pytest.fixture(scope="module")
def client(loaded):
    pipe, facts = loaded
    limits = Limits(max_steps=20, max_side=128, max_num_images=3, max_prompt=100, max_body=200_000)
    with serving(create_app(pipe, limits, facts=facts)) as client:
        yield client


@pytest.fixture
def waiting(monkeypatch) -> Iterator[tuple[WaitingPipe, Client]]:
    """A queue with room for one."""
    monkeypatch.setattr(worker, "HEARTBEAT", 0.05)
    pipe = WaitingPipe()
    with serving(create_app(pipe, Limits(max_queue=1))) as client:
        yield pipe, client
        pipe.finish.release(100)


def opened(png: bytes) -> dict[str, object]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(png)
        file.flush()
        return read_parameters(file.name)


# ---- pictures


def test_the_same_bytes_as_the_command_line(client, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["--prompt", "A fox", "--negative-prompt", "blur", "--steps", "3", "--seed", "5", "--cfg-scale", "4"]
    line += ["--sampler", "ddim", "--width", "128", "--ckpt", str(tiny_checkpoint), "--device", "cpu"]
    assert inference.main(line) == 0
    wanted = {"prompt": "A fox", "negative_prompt": "blur", "steps": 3, "seed": 5, "cfg_scale": 4, "width": 128}
    status, headers, png = client.draw(**wanted, sampler="ddim", height=None)
    assert (status, headers["content-type"]) == (200, PNG)
    assert png == Path("output.png").read_bytes()


def test_several_pictures_are_json(client):
    status, headers, body = client.draw(num_images=2, seed=7)
    assert (status, headers["content-type"]) == (200, JSON)
    pictures = json.loads(body)["pictures"]
    assert [picture["parameters"]["seed"] for picture in pictures] == [7, 8]
    for picture in pictures:
        assert set(picture["times"]) == {"text", "denoise", "decode"}
        png = base64.b64decode(picture["png"])
        assert opened(png) == picture["parameters"]
        assert png == client.draw(seed=picture["parameters"]["seed"])[2]


def test_a_stream_of_progress(client):
    status, headers, body = client.draw(NDJSON, steps=2, num_images=2)
    assert (status, headers["content-type"]) == (200, NDJSON)
    events = [event for event in map(json.loads, body.splitlines()) if event["event"] != "waiting"]
    assert [event["event"] for event in events] == ["step", "step", "picture"] * 2 + ["done"]
    assert events[4] == {"event": "step", "picture": 2, "pictures": 2, "step": 2, "steps": 2}
    png = base64.b64decode(events[5]["png"])
    assert opened(png) == events[5]["parameters"]


def test_previews_in_the_stream(client):
    _, _, body = client.draw(NDJSON, steps=4, preview=2)
    steps = [one for one in map(json.loads, body.splitlines()) if one["event"] == "step"]
    assert ["preview" in one for one in steps] == [False, True, False, True]
    for one in steps[1::2]:
        with Image.open(io.BytesIO(base64.b64decode(one["preview"]))) as image:
            assert (image.format, image.size) == ("PNG", (8, 8))
    for wrong in (0, "2", True):
        assert client.error("POST", "/generate", {"prompt": "x", "preview": wrong})[0] == 422


@pytest.mark.parametrize(
    ("accept", "pictures", "answer"),
    [
        ("", 1, PNG),
        ("*/*", 1, PNG),
        ("*/*", 2, JSON),
        ("image/png", 2, JSON),
        ("text/html, application/json;q=0.9, image/png", 1, JSON),
        ("Application/X-NDJSON", 2, NDJSON),
    ],
)
def test_the_accept_header(accept, pictures, answer):
    assert answer_type(accept, pictures) == answer


def test_seeds_are_drawn_at_random(client):
    assert opened(client.draw()[2])["seed"] != opened(client.draw()[2])["seed"]


def test_from_a_picture_and_again(client, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").save("upload", format="PNG")
    encoded = base64.b64encode(Path("upload").read_bytes()).decode()
    for text in (encoded, f"data:image/png;base64,{encoded}"):
        status, _, png = client.draw(init_image=text, strength=0.5, steps=4, seed=1)
        assert status == 200
    Path("drawn.png").write_bytes(png)
    assert opened(png)["init_image"] == "upload"
    assert inference.main(["--from-png", "drawn.png", "--out", "again.png", "--ckpt", str(tiny_checkpoint)]) == 0
    assert Path("again.png").read_bytes() == png


def test_with_a_mask(client, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((64, 64)).save("start.png")
    shape = Image.new("L", (64, 64))
    shape.paste(255, (0, 0, 32, 64))
    shape.save("mask.png")
    files = {f: base64.b64encode(Path(f"{f}.png").read_bytes()).decode() for f in ("start", "mask")}
    given = {"steps": 3, "seed": 1, "mask_invert": True, "mask_blur": 2}
    status, _, png = client.draw(init_image=files["start"], mask=files["mask"], **given)
    assert status == 200
    assert {"init_image": "upload", "mask": "upload", "mask_invert": True}.items() <= opened(png).items()
    Path("drawn.png").write_bytes(png)
    line = ["--from-png", "drawn.png", "--init-image", "start.png", "--mask", "mask.png", "--out", "again.png"]
    assert inference.main([*line, "--ckpt", str(tiny_checkpoint)]) == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open("drawn.png")))


# ---- requests that are wrong


def picture(width: int, height: int) -> str:
    data = io.BytesIO()
    Image.new("1", (width, height)).save(data, format="PNG")
    return base64.b64encode(data.getvalue()).decode()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "prompt is missing"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": 3}, "prompt must be text"),
        ({"prompt": "\ud800"}, "not Unicode"),
        ({"prompt": "x" * 101}, "prompt must be at most 100 characters, not 101"),
        ({"prompt": "x", "negative_prompt": "x" * 101}, "negative_prompt must be at most 100"),
        ({"prompt": "x", "steps": 21}, "steps must be at most 20 here, not 21"),
        ({"prompt": "x", "steps": 0}, "steps must be from 1 to 20, not 0"),
        ({"prompt": "x", "steps": -3.0}, "steps must be from 1 to 20, not -3.0"),
        ({"prompt": "x", "steps": "9"}, "steps must be a whole number"),
        ({"prompt": "x", "height": 192}, "height must be at most 128"),
        ({"prompt": "x", "width": 100}, "not a multiple of 64"),
        ({"prompt": "x", "num_images": 4}, "num_images must be at most 3"),
        ({"prompt": "x", "cfg_scale": float("nan")}, "finite"),
        ({"prompt": "x", "seed": -1}, "seed must be from 0"),
        ({"prompt": "x", "seed": 2**63 - 1, "num_images": 2}, "seed must be from 0"),
        ({"prompt": "x", "sampler": "magic"}, "there are ddpm, ddim"),
        ({"prompt": "x", "mask": "/etc/hostname"}, "it needs init_image, that picture"),
        ({"prompt": "x", "init_image": picture(8, 8), "mask": "/etc/hostname"}, "mask is not base64"),
        ({"prompt": "x", "init_image": picture(8, 8), "outpaint": "4000,0,0,0"}, "outpaint: at most"),
        ({"prompt": "x", "hires": 4, "width": 64}, "hires makes 256 pixels of a side, and at most"),
        ({"prompt": "x", "strength": 2}, "strength must be over 0"),
        ({"prompt": "x", "step": 3}, "no parameter 'step'"),
        ({"prompt": "x", "init_image": 3}, "in base64"),
        ({"prompt": "x", "init_image": "%"}, "not base64"),
        ({"prompt": "x", "init_image": "/etc/passwd"}, "init_image"),
        ({"prompt": "x", "init_image": base64.b64encode(b"GIF89a").decode()}, "cannot be read as a picture"),
        ({"prompt": "x", "init_image": picture(64, 64)[:90]}, "init_image"),
        ({"prompt": "x", "init_image": picture(5000, 4000)}, "5000x4000"),
        ({"prompt": "x", "init_image": picture(500, 1)}, "too oblong"),
    ],
)
def test_wrong_parameters(client, values, words):
    status, message = client.error("POST", "/generate", values)
    assert status == 422
    assert words in message


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"prompt": ' + b"1" * 5000 + b"}"])
def test_bodies_that_are_no_json_object(client, body):
    status, message = client.error("POST", "/generate", body, content_type=JSON)
    assert status == 400
    assert message.startswith("the body is not")


def test_bodies_that_are_too_long(client):
    status, message = client.error("POST", "/generate", {"prompt": "x" * 200_000})
    assert (status, message) == (413, "the body must be at most 200000 bytes")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_form_of_another_site_can_send(client, kind):
    assert client.error("POST", "/generate", b'{"prompt": "x"}', content_type=kind)[0] == 415


def test_wrong_addresses(client):
    assert client.error("GET", "/generate") == (405, "/generate takes POST, OPTIONS")
    assert client.error("GET", "/docs") == (404, "Not Found")
    assert client.error("GET", "/openapi.json")[0] == 404


def test_a_fault_is_one_line_for_the_client_and_a_traceback_in_the_log(loaded, monkeypatch, caplog):
    pipe, facts = loaded
    monkeypatch.setattr(pipe, "generate", lambda *_, **__: 1 / 0)
    with serving(create_app(pipe, facts=facts)) as client:
        assert client.error("POST", "/generate", {"prompt": "x"}) == (500, "this failed; the server's log says why")
        monkeypatch.setattr("sd.service.app.read_order", lambda *_: 1 / 0)
        assert client.error("POST", "/generate", {"prompt": "x"}) == (500, "this failed; the server's log says why")
    assert caplog.text.count("ZeroDivisionError") == 2


def test_out_of_memory(loaded, monkeypatch):
    def generate(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    pipe, _ = loaded
    monkeypatch.setattr(pipe, "generate", generate)
    with serving(create_app(pipe)) as client:
        assert client.error("POST", "/generate", {"prompt": "x"})[0] == 503
        last = json.loads(client.draw(NDJSON)[2].splitlines()[-1])
    assert last == {"event": "error", "status": 503, "error": "out of memory: ask for a smaller height and width"}


# ---- the queue


def test_one_at_a_time_and_a_bounded_queue(waiting):
    pipe, client = waiting
    request = ("POST", "/generate", {"prompt": "x"})
    with client.open(*request, accept=NDJSON) as first, client.open(*request, accept=NDJSON) as second:
        assert event(first) == {"event": "waiting", "before": 0}
        assert event(second) == {"event": "waiting", "before": 1}
        status, headers, body = client(*request)
        assert (status, headers["retry-after"]) == (503, "10"), "nothing has been measured yet"
        assert "the queue is full (1 waiting)" in json.loads(body)["error"]
        health = json.loads(client("GET", "/healthz")[2])
        assert (health["ready"], health["drawing"], health["queue"]) == (False, True, 1)
        pipe.finish.release(2)
        for response in (first, second):
            assert json.loads(response.read().splitlines()[-1]) == {"event": "done"}
    health = json.loads(client("GET", "/healthz")[2])
    assert (health["ready"], health["drawing"], health["queue"]) == (True, False, 0)


def test_no_place_is_taken_when_the_answer_is_there(waiting):
    pipe, client = waiting
    for _ in range(20):
        pipe.finish.release()
        assert client.draw()[0] == 200
        assert json.loads(client("GET", "/healthz")[2])["drawing"] is False


@pytest.mark.parametrize("accept", [PNG, JSON, NDJSON])
def test_a_client_that_hangs_up_is_not_drawn_for(waiting, accept):
    pipe, client = waiting
    connection = http.client.HTTPConnection("127.0.0.1", client.port)
    connection.request("POST", "/generate", json.dumps({"prompt": "gone"}), {"Content-Type": JSON, "Accept": accept})
    assert pipe.began.get(timeout=120) == "gone"
    connection.close()
    assert pipe.left.get(timeout=120) == "gone"
    pipe.finish.release()
    assert client.draw(prompt="next")[0] == 200


def test_a_client_that_hangs_up_gives_its_place_back(waiting):
    pipe, client = waiting
    request = ("POST", "/generate")
    with client.open(*request, {"prompt": "first"}, accept=NDJSON) as first:
        event(first)
        with client.open(*request, {"prompt": "second"}, accept=NDJSON) as second:
            assert event(second)["before"] == 1
        deadline = time.monotonic() + 120
        while not json.loads(client("GET", "/healthz")[2])["ready"]:
            assert time.monotonic() < deadline
        with client.open(*request, {"prompt": "third"}, accept=NDJSON) as third:
            assert event(third)["before"] == 1
            pipe.finish.release(2)
            assert b"picture" in third.read()
    assert [pipe.began.get(timeout=120) for _ in range(2)] == ["first", "third"]


# ---- who may ask


def basic(text: str) -> str:
    return f"Basic {base64.b64encode(text.encode()).decode()}"


def test_a_password(loaded, monkeypatch):
    monkeypatch.setattr(Lockout, "FIRST_DELAY", 0.0)
    with serving(create_app(loaded[0], auth=BasicAuth("räv", "se:sam"))) as client:
        assert client("GET", "/healthz", authorization=basic("räv:se:sam"))[0] == 200
        for path in ("/", "/healthz", "/nothing"):
            status, headers, body = client("GET", path)
            assert (status, headers["www-authenticate"][:6]) == (401, "Basic ")
            assert json.loads(body) == {"error": "a user name and a password are needed"}
        wrong = ["räv:", "räv:se", ":se:sam", "räv:se:sam ", ""]
        for authorization in (*map(basic, wrong), "Basic", "Basic %", basic("räv:se:sam").replace("Basic", "Bearer")):
            assert client.error("POST", "/generate", {"prompt": "x"}, authorization=authorization)[0] == 401
        assert client("GET", "/", authorization=basic("räv:se:sam").replace("Basic", "basic"))[0] == 200


def test_a_password_is_not_shown():
    assert "sesam" not in repr(BasicAuth("x", "sesam"))


def test_auth_from_the_environment():
    assert auth_from_env({}) is auth_from_env({"SD_AUTH": "none"}) is auth_from_env({"SD_AUTH": ""}) is None
    assert auth_from_env({"SD_AUTH": "basic", "SD_USER": "a", "SD_PASSWORD": "b:c"}) == BasicAuth("a", "b:c")
    for wrong in ({"SD_AUTH": "Basic"}, {"SD_AUTH": "basic"}, {"SD_AUTH": "basic", "SD_USER": "a", "SD_PASSWORD": ""}):
        with pytest.raises(UserError, match="SD_AUTH"):
            auth_from_env(wrong)


def test_another_name_for_loopback(loaded):
    with serving(create_app(loaded[0], hosts={"localhost", "127.0.0.1", "::1"})) as client:
        for host in ("127.0.0.1:99", "localhost", "LOCALHOST:8000", "[::1]:8000"):
            assert client("GET", "/healthz", host=host)[0] == 200
        for host in ("evil.example:8000", "127.0.0.1.evil.example", "", "a:b:c"):
            assert client.error("GET", "/healthz", host=host)[0] == 403


def test_host_names():
    assert [host_name(host) for host in ("a.b:1", "A", "[::1]", "::1", "")] == ["a.b", "a", "::1", "", ""]


# ---- what browsers are told


def test_security_headers_everywhere(client):
    for request in (("GET", "/"), ("GET", "/nothing"), ("POST", "/generate", b"x"), ("GET", "/healthz")):
        headers = client(*request)[1]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]


def test_the_page_loads_nothing_from_elsewhere(client):
    status, headers, body = client("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert not re.search(r"https?:|//\w", re.sub(r"// .*", "", body.decode()))


def test_healthz(client, tiny_checkpoint):
    health = json.loads(client("GET", "/healthz")[2])
    assert health["ready"] is True
    assert (health["model"], health["checkpoint"], health["device"]) == ("tiny", tiny_checkpoint.name, "cpu")
    assert health["limits"]["max_steps"] == 20
    assert (health["image_size"], health["opt"]) == (64, "")


# ---- the command line


def test_limits(monkeypatch):
    assert limits_from_env({}) == Limits()
    monkeypatch.setenv("SD_MAX_STEPS", "7")
    monkeypatch.setenv("SD_MAX_QUEUE", "0")
    assert serve.parse_arguments(["--max-queue", "3"])[1] == Limits(max_steps=7, max_queue=3)
    for wrong in ("x", "-1", "1.5"):
        with pytest.raises(UserError, match="SD_MAX_SIDE must be a whole number"):
            limits_from_env({"SD_MAX_SIDE": wrong})
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        Limits(max_steps=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "needs SD_AUTH=basic"),
        (["--host", "::"], "needs SD_AUTH=basic"),
        (["--host", "example.org"], "needs SD_AUTH=basic"),
        (["--port", "99999"], "--port must be from 0 to 65535"),
        (["--port", "x"], "invalid int"),
        (["--max-side", "0"], "max_side must be at least 1"),
        (["--port", "0", "--ckpt", "none.safetensors"], "none.safetensors"),
        (["--port", "0", "--device", "cuda:77"], "--device"),
        (["--port", "0", "--opt", "faster"], "no optimization 'faster'"),
    ],
)
def test_a_start_that_fails(tiny_checkpoint, monkeypatch, capfd, arguments, words):
    monkeypatch.setenv("SD_CKPT", str(tiny_checkpoint))
    monkeypatch.delenv("SD_AUTH", raising=False)
    assert serve.main(arguments) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_a_port_in_use(client, capfd):
    assert serve.main(["--port", str(client.port)]) == 2
    assert f"port {client.port} cannot be used (Address already in use)" in capfd.readouterr().err


def drawing(client: Client) -> AbstractContextManager[http.client.HTTPResponse]:
    """A request that is drawn until the server ends."""
    return client.open("POST", "/generate", {"prompt": "x", "steps": 1000}, accept=NDJSON)


def test_it_runs_from_any_directory_until_interrupted(tiny_checkpoint, tmp_path):
    with started("--ckpt", str(tiny_checkpoint), "--max-steps", "1000", folder=tmp_path) as (process, client):
        with drawing(client) as response:
            while event(response)["event"] != "step":
                pass
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=1200)
        assert process.returncode == 130
        assert errors == "interrupted\n"


def test_sigterm_finishes_what_is_drawn_and_refuses_what_is_new(tiny_checkpoint, tmp_path):
    with started("--ckpt", str(tiny_checkpoint), folder=tmp_path) as (process, client):
        with client.open("POST", "/generate", {"prompt": "x", "steps": 100}, accept=NDJSON) as first:
            while event(first)["event"] != "step":
                pass
            with client.open("POST", "/generate", {"prompt": "y"}, accept=NDJSON) as second:
                event(second)
                process.send_signal(signal.SIGTERM)
                last = json.loads(second.read().splitlines()[-1])
                assert (last["event"], last["status"], last["error"]) == ("error", 503, ENDING)
                assert client.error("POST", "/generate", {"prompt": "z"}) == (503, ENDING)
            assert [json.loads(line)["event"] for line in first.read().splitlines()][-2:] == ["picture", "done"]
        process.wait(300)
        assert process.returncode == 0
        assert "Traceback" not in process.stderr.read()


def test_help_needs_neither_torch_nor_the_web_framework():
    code = "import sys, sd.serve, sd.inference\ntry: sd.serve.main(['--help'])\nfinally:\n"
    code += "    assert not {'torch', 'numpy', 'fastapi', 'uvicorn'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROGRAM.parent.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--max-steps" in result.stdout


def test_drawing_needs_no_web_framework():
    """A few files import it, and they are imported when an app is made, no earlier."""
    folder = PROGRAM.parent
    files = {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*.py")}
    framework = re.compile(r"^(from|import) (fastapi|starlette|uvicorn|prometheus_client)\b", re.MULTILINE)
    theirs = {name for name, text in files.items() if framework.search(text)}
    assert theirs == {f"service/{name}.py" for name in ("answers", "app", "connections", "guard", "metrics", "server")}
    app = re.compile(r"^(from|import) sd\.service(\.(app|server)\b| import .*\b(app|server)\b)", re.MULTILINE)
    assert [name for name, text in files.items() if app.search(text)] == []


def test_small_answers_do_not_wait():
    """asyncio sends at once where the socket says that it is TCP."""
    with serve.bind("127.0.0.1", 0) as sock:
        assert sock.proto == socket.IPPROTO_TCP

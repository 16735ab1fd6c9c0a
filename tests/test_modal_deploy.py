"""`modal deploy modal_inference.py`: what is asked of Modal, and the service inside its container."""

import base64
import io
import json
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from modal_proto import api_pb2
from PIL import Image
from safetensors.torch import load_file

import modal_inference
from bench.reference.numbers import pixels
from sd.checkpoints.mapped import mapped
from sd.pipeline import DEMO_CHECKPOINT, StableDiffusion
from sd.service.worker import ENDING
from tests.modal_fixtures import drawn_here, wait_for

pytest_plugins = ["tests.modal_fixtures"]
pytest.importorskip("fastapi")


def web(loopback) -> api_pb2.WebhookConfig:
    return loopback.plane.function("Service.*").definition.method_definitions["web"].webhook_config


def test_it_is_closed_by_default(loopback):
    result = loopback.run("deploy", "modal_inference.py")
    assert result.code == 0, result.text
    assert web(loopback).type == api_pb2.WEBHOOK_TYPE_ASGI_APP
    assert web(loopback).requires_proxy_auth
    asked = loopback.plane.function("Service.*").definition
    assert asked.resources.gpu_config.gpu_type == "A10"
    assert asked.checkpointing_enabled
    assert (asked.concurrency_limit, asked.max_concurrent_inputs) == (1, 100)
    assert loopback.plane.tasks == {}


def test_basic_authentication_needs_its_secret(loopback):
    del loopback.plane.deployed_secrets["sd-auth"]["SD_PASSWORD"]
    result = loopback.run("deploy", "modal_inference.py", SD_AUTH="basic")
    assert result.code != 0
    assert "sd-auth" in result.text


def test_the_service_in_its_container(loopback, tmp_path):
    settings = {"SD_AUTH": "basic", "SD_GPU": "none", "SD_CKPT_NAME": "demo", "SD_OPT": "none", "SD_MAX_STEPS": "20"}
    result = loopback.run("deploy", "modal_inference.py", **settings)
    assert result.code == 0, result.text
    assert not web(loopback).requires_proxy_auth
    service = loopback.plane.function("Service.*")
    password = {"Authorization": "Basic " + base64.b64encode(b"ada:enigma").decode()}

    def ask(method: str, path: str, headers: dict[str, str], **order: object):
        body = json.dumps(order).encode() if order else b""
        headers = {**headers, "Content-Type": "application/json", "Content-Length": str(len(body))}
        return loopback.plane.http(service, method, path, headers, body)

    order = {"prompt": "a red apple", "steps": 2, "seed": 5}
    status, headers, body = ask("POST", "/generate", {**password, "Accept": "image/png"}, **order)
    assert (status, headers["content-type"]) == (200, "image/png"), body
    arguments = ["--prompt", "a red apple", "--steps", "2", "--seed", "5"]
    drawn_here(tmp_path / "local.png", DEMO_CHECKPOINT, *arguments, "--opt", "none")
    assert (np.asarray(Image.open(io.BytesIO(body))) == pixels(tmp_path / "local.png")).all()

    assert ask("POST", "/generate", {}, **order)[0] == 401
    assert ask("GET", "/", {})[0] == 401
    status, headers, body = ask("GET", "/", password)
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/html")
    assert ask("GET", "/healthz", password)[0] == 200
    status, _, body = ask("POST", "/generate", password, **{**order, "steps": 21})
    assert status == 422
    assert "steps must be at most 20" in json.loads(body)["error"]
    assert len(loopback.plane.tasks) == 1  # loaded once, many requests


def test_an_interrupted_service_says_so(loopback):
    """A machine that is taken away interrupts its container: what waits hears that it may ask again, none is dropped.

    What is drawn is finished, or told the same where this machine takes longer than the grace.
    """
    settings = {"SD_AUTH": "basic", "SD_GPU": "none", "SD_CKPT_NAME": "demo", "SD_OPT": "none", "SD_MAX_STEPS": "1000"}
    assert loopback.run("deploy", "modal_inference.py", **settings).code == 0
    service = loopback.plane.function("Service.*")
    headers = {"Authorization": "Basic " + base64.b64encode(b"ada:enigma").decode(), "Content-Type": "application/json"}

    def ask(method: str, path: str, **order: object) -> tuple[int, dict[str, str], bytes]:
        body = json.dumps(order).encode() if order else b""
        return loopback.plane.http(service, method, path, {**headers, "Content-Length": str(len(body))}, body)

    def one_waits() -> bool:
        return json.loads(ask("GET", "/healthz")[2])["queue"] == 1

    assert ask("POST", "/generate", prompt="x", steps=1)[0] == 200
    with ThreadPoolExecutor(2) as clients:
        orders = [clients.submit(ask, "POST", "/generate", prompt="x", steps=60) for _ in range(2)]
        wait_for(one_waits)
        (task,) = loopback.plane.tasks.values()
        task.process.send_signal(signal.SIGINT)
        answers = sorted((order.result(60) for order in orders), key=lambda answer: answer[0])
    refused = [json.loads(body)["error"] for status, _, body in answers if status != 200]
    assert [status for status, *_ in answers] in ([200, 503], [503, 503])
    assert refused == [ENDING] * len(refused)
    wait_for(lambda: not task.alive)


def test_nothing_is_mapped_when_the_snapshot_is_taken(monkeypatch, tmp_path):
    """A checkpoint on disk as it is used, which is mapped otherwise; the weights are as the file has them."""
    path = tmp_path / "demo.safetensors"
    StableDiffusion.load(DEMO_CHECKPOINT, "cpu", torch.float16).save(path)
    monkeypatch.setenv("SD_GPU", "A10")
    monkeypatch.setattr(modal_inference, "checkpoint_path", lambda name: path)
    left = {}
    for deployed in (False, True):
        warm = modal_inference.Warm()
        warm.deployed = deployed
        modal_inference.Warm.read._get_raw_f()(warm)
        left[deployed] = len(mapped(warm.pipe.unet.parameters()))
    assert left[False] > 100
    assert left[True] == 0
    read = load_file(path)
    name = "model.diffusion_model.out.2.weight"
    assert torch.equal(warm.pipe.unet.out[2].weight, read[name])
    assert warm.pipe.as_loaded(["unet.out.2.weight"])

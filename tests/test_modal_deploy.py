"""`modal deploy modal_inference.py`: what is asked of Modal, and the service inside its container."""

import base64
import io
import json

import numpy as np
import pytest
from modal_proto import api_pb2
from PIL import Image

from bench.reference.numbers import pixels
from sd.pipeline import DEMO_CHECKPOINT
from tests.modal_fixtures import drawn_here

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

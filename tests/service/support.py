"""Both ends of the service: a server on a loopback port in this process, its clients, and pipelines without a model."""

import http.client
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

from bench.reference.weights import tiny_config
from sd import serve
from sd.embeddings import Words
from sd.service import worker
from sd.service.orders import Limits
from sd.service.server import Server
from sd.tokenizer import Tokenizer

PNG, JSON, NDJSON = "image/png", "application/json", "application/x-ndjson"


class Client:
    """Requests to one port."""

    def __init__(self, port: int, server: Server | None = None):
        self.port = port
        self.server = server

    def connection(self, address: str = "127.0.0.1") -> http.client.HTTPConnection:
        """From an address of this machine: all of 127.0.0.0/8 are, on Linux."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120, source_address=(address, 0))

    def __call__(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict, bytes]:
        """(status, headers in lower case, body). A body that is not bytes is sent as JSON; headers as x_y for X-Y."""
        with self.open(method, path, body, **headers) as response:
            return response.status, {name.lower(): text for name, text in response.getheaders()}, response.read()

    @contextmanager
    def open(self, method: str, path: str, body: object = None, **headers: str) -> Iterator[http.client.HTTPResponse]:
        """The response while its body may still be coming; leaving the block hangs up."""
        connection = self.connection(headers.pop("from_address", "127.0.0.1"))
        headers = {name.replace("_", "-"): text for name, text in headers.items()}
        if body is not None and not isinstance(body, bytes):
            headers = {"Content-Type": JSON, **headers}
            body = json.dumps(body).encode()
        connection.request(method, path, body, headers)
        with connection.getresponse() as response:
            try:
                yield response
            finally:
                connection.close()

    def draw(self, accept: str = PNG, from_address: str = "127.0.0.1", **values: object) -> tuple[int, dict, bytes]:
        values = {"prompt": "x", "steps": 1, **values}
        return self("POST", "/generate", values, accept=accept, from_address=from_address)

    def error(self, *request: object, **headers: str) -> tuple[int, str]:
        status, answered, body = self(*request, **headers)
        assert answered["content-type"] == JSON
        message = json.loads(body)["error"]
        assert "\n" not in message
        assert "Traceback" not in message
        return status, message


@contextmanager
def started(*options: str, folder: Path, **environment: str) -> Iterator[tuple[subprocess.Popen, Client]]:
    """The program in a process, which is gone afterwards however the test ends."""
    line = [sys.executable, serve.__file__, "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SD_AUTH": "none", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=folder, env=environment, **pipes) as process:
        try:
            said = process.stdout.readline()
            port = re.fullmatch(r".* on \w+: http://127.0.0.1:(\d+)/\n", said)
            assert port, said + process.stderr.read()
            yield process, Client(int(port[1]))
        finally:
            process.kill()


@contextmanager
def serving(app, limits: Limits = Limits(), grace: float = 0.0, **options: object) -> Iterator[Client]:  # noqa: B008
    sock = serve.bind("127.0.0.1", 0)
    sock.listen()
    server = Server(app, limits, grace, **options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield Client(sock.getsockname()[1], server)
    finally:
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive()


class WithoutModel:
    """What the service looks at of a pipeline; it has learned every word."""

    def __init__(self):
        self.config, self.dtype, self.device = tiny_config(), torch.float32, torch.device("cpu")
        self.tokenizer = Tokenizer()
        self.words = Words(self.config.text.vocab_size)
        table = SimpleNamespace(weight=torch.ones(self.config.text.vocab_size, 1))
        self.clip = SimpleNamespace(embeddings=SimpleNamespace(token_embedding=table))
        self.times: dict[str, float] = {}
        self.source = None


class WaitingPipe(WithoutModel):
    """Draws step after step until its client has left or the test lets it finish; one picture at a time."""

    def __init__(self):
        super().__init__()
        self.began: queue.Queue[str] = queue.Queue()
        self.left: queue.Queue[str] = queue.Queue()
        self.finish = threading.Semaphore(0)
        self.alone = threading.Lock()

    def generate(self, prompts, steps: int, on_step: Callable, **settings) -> list[Image.Image]:
        assert self.alone.acquire(blocking=False), "two at once"
        self.began.put(prompts[0])
        try:
            while not self.finish.acquire(timeout=0.01):
                on_step(1, steps, None)
        except worker.LeftError:
            self.left.put(prompts[0])
            raise
        finally:
            self.alone.release()
        return [Image.new("RGB", (8, 8))]


def event(response: http.client.HTTPResponse) -> dict[str, object]:
    return json.loads(response.readline())


class InstantPipe(WithoutModel):
    """Draws the same picture at once, after a moment if one is given."""

    def __init__(self, image: Image.Image | None = None, seconds: float = 0.0):
        super().__init__()
        self.image = image or Image.new("RGB", (8, 8))
        self.seconds = seconds

    def generate(self, prompts, steps: int, on_step: Callable, **settings) -> list[Image.Image]:
        time.sleep(self.seconds)
        for step in range(1, steps + 1):
            on_step(step, steps, None)
        self.times |= {"text": 0.25, "denoise": 0.5}
        return [self.image.copy()]

"""The HTTP service: a FastAPI app over one loaded pipeline.

    POST /generate    JSON in; a PNG, JSON, or a stream of progress and pictures out, as the Accept header says
    GET  /healthz     the model, the limits and the queue
    GET  /            a page to try it, sd/serve.html

Progress comes in the answer itself, a line of JSON an event: a second request to ask for it could reach another
container behind a proxy, and a client that leaves takes its place in the queue with it.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sd import memory
from sd.images import to_png
from sd.jobs import Job
from sd.orders import Limits, Order, read_order
from sd.worker import Event, FailedError, Report, Task, Work, Worker

if TYPE_CHECKING:
    from PIL import Image

    from sd.pipeline import OnStep, StableDiffusion

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("serve.html")
PNG, JSON, NDJSON = "image/png", "application/json", "application/x-ndjson"
RETRY_AFTER = 10
"""Seconds that a client should wait when the queue is full."""
SLOWEST_UPLOAD = 30.0
"""Seconds in which a request's body must have arrived."""


def create_app(
    pipe: "StableDiffusion",
    limits: Limits,
    auth: "BasicAuth | None" = None,
    facts: Mapping[str, object] | None = None,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The service over `pipe`, which it uses from a single thread.

    auth: None leaves it to whoever calls this to keep strangers out (a loopback address, a proxy).
    facts: what each PNG says of the model and the machine (`inference.facts`); None is what the pipeline itself tells.
    hosts: the names that the Host header may have; None: any.
    """
    service = Service(pipe, limits, known(pipe) if facts is None else facts)
    app = FastAPI(openapi_url=None, lifespan=service.lifespan)  # no schema, so no /docs, which load foreign scripts
    app.add_api_route("/generate", service.generate, methods=["POST"], response_model=None)
    app.add_api_route("/healthz", service.healthz, methods=["GET"], response_model=None)
    app.add_api_route("/", service.page, methods=["GET"], response_model=None)
    app.add_exception_handler(FailedError, lambda request, error: refusal(error.status, str(error)))
    app.add_exception_handler(
        HTTPException, lambda request, error: refusal(error.status_code, error.detail, error.headers)
    )
    app.add_middleware(Guard, auth=auth, hosts=hosts, policy=content_security_policy(service.html))
    return app


def known(pipe: "StableDiffusion") -> dict[str, object]:
    return {
        "model": pipe.config.name,
        "opt": ",".join(getattr(pipe, "optimizations", [])),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": str(pipe.device),
        "torch": torch.__version__,
    }


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """One readable line, whatever is wrong."""
    return JSONResponse({"error": " ".join(message.split())}, status, headers)


# ---- drawing


def drawing(pipe: "StableDiffusion", order: Order, facts: Mapping[str, object]) -> Work:
    """What the worker does for an order: it reports every step and every picture, PNG bytes and parameters.

    One picture at a time, so that each is what its seed draws alone, and memory is that of one.
    """

    def work(report: Report) -> None:
        start = time.perf_counter()
        for number, job in enumerate(order.jobs, start=1):
            place = {"picture": number, "pictures": len(order.jobs)}

            def on_step(step: int, steps: int, latents: torch.Tensor, place: Event = place) -> None:
                report({"event": "step", **place, "step": step, "steps": steps})

            image = draw(pipe, order, job, on_step)
            parameters = {**image.info, **facts}
            png = to_png(image, parameters)
            report({"event": "picture", **place, "png": png, "parameters": parameters, "times": dict(pipe.times)})
        log.info("%d drawn in %.2f s", len(order.jobs), time.perf_counter() - start)

    return work


def draw(pipe: "StableDiffusion", order: Order, job: Job, on_step: "OnStep") -> "Image.Image":
    """One job of the order, with all that its PNG will say of it in `info`. Raises FailedError when out of memory."""
    pipe.times.clear()
    try:
        [image] = pipe.generate(
            [job.prompt],
            [job.negative_prompt],
            job.steps,
            job.cfg_scale,
            [job.seed],
            job.height,
            job.width,
            job.sampler,
            order.init_image,
            job.strength,
            on_step=on_step,
        )
        image.info |= {**order.origin, "batch": [0, 1]}
        return image
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
    memory.release(pipe.device)  # out here, where the error no longer holds the picture's tensors
    raise FailedError(503, "out of memory: ask for a smaller height and width")


# ---- answers


def answer_type(accept: str, pictures: int) -> str:
    """Of the types that can be answered, the first that an Accept header names; a PNG holds one picture only."""
    named = (part.partition(";")[0].strip() for part in accept.lower().split(","))
    first = next((name for name in named if name in (PNG, JSON, NDJSON)), PNG)
    return JSON if first == PNG and pictures > 1 else first


def to_json(value: object) -> str:
    """JSON with bytes as base64."""
    return json.dumps(value, ensure_ascii=False, default=lambda data: base64.b64encode(data).decode())


class Lines(StreamingResponse):
    """The task's events, one a line of JSON. However it ends, the task's place is free then."""

    def __init__(self, task: Task):
        super().__init__(self._lines(), headers={"X-Accel-Buffering": "no"}, media_type=NDJSON)
        self.task = task

    async def _lines(self) -> AsyncIterator[str]:
        async for event in self.task.events():
            yield to_json(event) + "\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)  # which stops when the client leaves
        finally:
            self.task.cancel()


async def pictures_of(task: Task, request: Request) -> list[Event]:
    """The task's pictures when all are drawn. Cancels it when the client leaves. Raises FailedError."""
    pictures = []
    try:
        async for event in task.events():
            if await request.is_disconnected():
                raise FailedError(499, "the client left")
            if event["event"] == "error":
                raise FailedError(event["status"], event["error"])
            if event["event"] == "picture":
                pictures.append({name: event[name] for name in ("png", "parameters", "times")})
    finally:
        task.cancel()
    return pictures


async def read_body(request: Request, most: int) -> bytes:
    """The body, if it is JSON by its header and not too long. Other pages' forms cannot send that header unasked."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
        raise FailedError(415, "send JSON, with the header Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(SLOWEST_UPLOAD):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise FailedError(413, f"the body must be at most {most} bytes")
    except TimeoutError:
        raise FailedError(408, f"the body did not arrive within {SLOWEST_UPLOAD:.0f} seconds") from None
    return bytes(body)


class Service:
    """The routes, with what they share."""

    def __init__(self, pipe: "StableDiffusion", limits: Limits, facts: Mapping[str, object]):
        self.pipe = pipe
        self.limits = limits
        self.facts = facts
        self.worker = Worker(limits.max_queue)
        self.html = PAGE.read_text(encoding="utf-8")

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        self.worker.close()

    async def generate(self, request: Request) -> Response:
        """POST /generate."""
        self._check_room()  # before an uploaded picture is decoded
        body = await read_body(request, self.limits.max_body)
        order = await asyncio.to_thread(read_order, body, self.limits, self.pipe.config)
        self._check_room()
        task = self.worker.submit(drawing(self.pipe, order, self.facts))
        answer = answer_type(request.headers.get("accept", ""), len(order.jobs))
        if answer == NDJSON:
            return Lines(task)
        pictures = await pictures_of(task, request)
        if answer == PNG:
            return Response(pictures[0]["png"], media_type=PNG)
        return Response(to_json({"pictures": pictures}), media_type=JSON)

    def _check_room(self) -> None:
        if not self.worker.has_room:
            message = f"the queue is full ({self.worker.waiting} waiting); try again in {RETRY_AFTER} seconds"
            raise HTTPException(503, message, {"Retry-After": str(RETRY_AFTER)})

    async def healthz(self) -> JSONResponse:
        """GET /healthz. ready: a request would be taken now."""
        config, worker = self.pipe.config, self.worker
        state = {"ready": worker.has_room, "drawing": worker.running, "queue": worker.waiting}
        model = {name: self.facts.get(name) for name in ("model", "checkpoint", "device", "dtype", "opt")}
        size = {"image_size": config.image_size, "size_multiple": config.size_multiple}
        return JSONResponse({**state, **model, **size, "limits": asdict(self.limits)})

    async def page(self) -> HTMLResponse:
        """GET /."""
        return HTMLResponse(self.html)


# ---- who may ask, and what the answers allow


@dataclass(frozen=True)
class BasicAuth:
    """The one name and password that HTTP Basic must bring."""

    user: str
    password: str = field(repr=False)

    def accepts(self, authorization: str) -> bool:
        """Whether this Authorization header is the right one; the time does not tell how near it was."""
        scheme, _, encoded = authorization.partition(" ")
        try:
            given = base64.b64decode(encoded.strip(), validate=True)
        except (binascii.Error, ValueError):
            return False
        return scheme.lower() == "basic" and hmac.compare_digest(given, f"{self.user}:{self.password}".encode())


def content_security_policy(html: str) -> str:
    """Nothing but the page's own script and style, its own server, and pictures made in the page."""
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Guard:
    """ASGI middleware: lets nobody in without the right Host and password; headers for browsers; no tracebacks."""

    def __init__(self, app: ASGIApp, auth: BasicAuth | None, hosts: Collection[str] | None, policy: str):
        self.app = app
        self.auth = auth
        self.hosts = hosts
        self.headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        try:
            await (self._refusal(Headers(scope=scope)) or self.app)(scope, receive, sending)
        except Exception:
            if started:
                raise
            log.exception("a request failed")
            await refusal(500, "this failed; the server's log says why")(scope, receive, sending)

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        if self.hosts is not None and host_name(headers.get("host", "")) not in self.hosts:
            return refusal(403, "this server does not answer to that host name")
        if self.auth and not self.auth.accepts(headers.get("authorization", "")):
            challenge = {"WWW-Authenticate": 'Basic realm="Stable Diffusion", charset="UTF-8"'}
            return refusal(401, "a user name and a password are needed", challenge)
        return None


def host_name(host: str) -> str:
    """A Host header without its port: "[::1]:8000" -> "::1"."""
    named = re.fullmatch(r"(\[[^]]*\]|[^:]*)(:\d*)?", host)
    return named[1].strip("[]").lower() if named else ""

"""The HTTP service: a FastAPI app over one loaded pipeline.

    POST /generate    JSON in; a PNG, JSON, or a stream of progress and pictures out, as the Accept header says
    GET  /healthz     the model, the limits and the queue
    GET  /            a page to try it, page.html

Progress comes in the answer itself, a line of JSON an event: a second request to ask for it could reach another
container behind a proxy, and a client that leaves takes its place in the queue with it.
"""

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sd.pictures.drawing import draw_batch, is_out_of_memory, release
from sd.pictures.model import facts_of
from sd.pictures.plan import Job
from sd.pictures.png import to_png
from sd.service.access import BasicAuth, content_security_policy, host_name
from sd.service.form import page_with_form
from sd.service.orders import Limits, Order, read_order
from sd.service.worker import Event, FailedError, Report, Task, Work, Worker

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from sd.pipeline import OnStep, StableDiffusion
    from sd.previews import Previews

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page.html")
PNG, JSON, NDJSON = "image/png", "application/json", "application/x-ndjson"
RETRY_AFTER = 10
"""Seconds that a client should wait when the queue is full."""
SLOWEST_UPLOAD = 30.0
"""Seconds in which a request's body must have arrived."""


def create_app(
    pipe: "StableDiffusion",
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    auth: BasicAuth | None = None,
    facts: Mapping[str, object] | None = None,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The service over `pipe`, which it uses from a single thread.

    auth: None leaves it to whoever calls this to keep strangers out (a loopback address, a proxy).
    facts: what each PNG says of model and machine (`ModelChoice.facts`); None is what the pipeline itself tells.
    hosts: the names that the Host header may have; None: any.
    """
    service = Service(pipe, limits, facts_of(pipe) if facts is None else facts)
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


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """One readable line, whatever is wrong."""
    return JSONResponse({"error": " ".join(message.split())}, status, headers)


# ---- drawing


def work_for(
    pipe: "StableDiffusion", order: Order, facts: Mapping[str, object], previews: "Callable[[], Previews]"
) -> Work:
    """What the worker does for an order: it reports every step and every picture, PNG bytes and parameters.

    One picture at a time, so that each is what its seed draws alone, and memory is that of one.
    """

    def work(report: Report) -> None:
        start = time.perf_counter()
        for number, job in enumerate(order.jobs, start=1):
            place = {"picture": number, "pictures": len(order.jobs)}

            def on_step(step: int, steps: int, latents: "Tensor", place: Event = place) -> None:
                due = order.preview and step % order.preview == 0
                seen = {"preview": to_png(previews()(latents)[0], {})} if due else {}
                report({"event": "step", **place, "step": step, "steps": steps, **seen})

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
        return draw_batch(pipe, [job], order.files, [order.origin], on_step)[0]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release(pipe.device)  # out here, where the error no longer holds the picture's tensors
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
        self.html = page_with_form(PAGE.read_text(encoding="utf-8"), limits, pipe.config)

    @cached_property
    def _previews(self) -> "Previews":
        """Fitted in the worker's thread, for the first who asks."""
        from sd.previews import Previews

        return Previews(self.pipe)

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
        task = self.worker.submit(work_for(self.pipe, order, self.facts, lambda: self._previews))
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

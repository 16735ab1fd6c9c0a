"""The HTTP service: a FastAPI app over one loaded pipeline.

    POST /generate    JSON in; a PNG, JSON, or a stream of progress and pictures out, as the Accept header says
    POST /parameters  a picture in; how it was drawn out
    GET  /healthz     the model, the limits and the queue
    GET  /metrics     what was done, for Prometheus
    GET  /            a page to use it, out of the files of page/

Progress comes in the answer itself, a line of JSON an event: a second request to ask for it could reach another
container behind a proxy, and a client that leaves takes its place in the queue with it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from sd.pictures.model import facts_of
from sd.service.access import BasicAuth, Lockout, client_of, content_security_policy
from sd.service.answers import SMALL_BODY, Body, Uploads, answer, refusal
from sd.service.drawing import Drawer
from sd.service.form import assembled, page_with_form
from sd.service.guard import Gate, Guard
from sd.service.logs import fault
from sd.service.metrics import CONTENT_TYPE_LATEST, Metrics
from sd.service.offers import Offers
from sd.service.orders import Limits, read_order
from sd.service.recall import recall
from sd.service.worker import ENDING, FailedError, Worker

if TYPE_CHECKING:
    from sd.pipeline import StableDiffusion

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

FLUSHED = 1.0
"""Seconds that a stopped drawing has, at the end, to tell its client."""


def create_app(
    pipe: "StableDiffusion",
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    auth: BasicAuth | None = None,
    facts: Mapping[str, object] | None = None,
    hosts: Collection[str] | None = None,
    log_prompts: bool = False,
    offers: Offers = Offers(),  # noqa: B008 (frozen)
) -> FastAPI:
    """The service over `pipe`, which it uses from a single thread. `app.state.service` is the Service.

    auth: None leaves it to whoever calls this to keep strangers out (a loopback address, a proxy).
    facts: what each PNG says of model and machine (`ModelChoice.facts`); None is what the pipeline itself tells.
    hosts: the names that the Host header may have; None: any.
    log_prompts: the log may hold what clients write.
    offers: LoRAs and optimizations that requests may name. Raises OptimizationError for what cannot run here.
    """
    service = Service(pipe, limits, facts_of(pipe) if facts is None else facts, log_prompts, offers)
    app = FastAPI(openapi_url=None, lifespan=service.lifespan)  # no schema, so no /docs, which load foreign scripts
    app.state.service = service
    for path, (method, answers) in service.routes.items():
        methods = [method, "HEAD"] if method == "GET" else [method]
        app.add_api_route(path, answers, methods=methods, response_model=None)
    app.add_exception_handler(FailedError, service.failed)
    app.add_exception_handler(HTTPException, service.http_error)
    gate, policy = Gate(auth, hosts, Lockout()), content_security_policy(service.html)
    app.add_middleware(
        Guard,
        gate=gate,
        policy=policy,
        queue=lambda: service.worker.waiting,
        seen=service.answered,
        on_fault=service.told,
    )
    return app


class Service:
    """The routes, with what they share."""

    def __init__(
        self,
        pipe: "StableDiffusion",
        limits: Limits,
        facts: Mapping[str, object],
        log_prompts: bool = False,
        offers: Offers = Offers(),  # noqa: B008 (frozen)
    ):
        self.pipe = pipe
        self.limits = limits
        self.facts = facts
        self.log_prompts = log_prompts
        self.offers = offers
        self.lost = ""
        self.worker = Worker(limits.max_queue, self.told)
        gpu = pipe.device if pipe.device.type == "cuda" else None
        self.metrics = Metrics(lambda: self.worker.waiting, lambda: self.worker.running, gpu)
        self.drawer = Drawer(pipe, facts, self.metrics, offers, self.lose)
        self.drawer.switcher.try_all(offers.opts)
        self.html = page_with_form(assembled(), limits, pipe.config, offers)
        self.routes = {
            "/generate": ("POST", self.generate),
            "/parameters": ("POST", self.parameters),
            "/healthz": ("GET", self.healthz),
            "/metrics": ("GET", self.text_of_metrics),
            "/": ("GET", self.page),
        }
        self._uploads = Uploads()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        self.worker.close()
        self._reader.shutdown(wait=False)

    async def end(self, grace: float) -> None:
        """Take nothing new, finish what is drawn within so many seconds, and tell all others that this is the end."""
        self.worker.end()
        try:
            async with asyncio.timeout(grace):
                while self.worker.running:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            self.worker.end(at_once=True)
            await asyncio.sleep(FLUSHED)

    def lose(self, message: str) -> None:
        """Nothing can be drawn any more: all that wait are told so, and whoever hosts this ends it. From any thread."""
        self.lost = message
        log.error("ending: %s", message)
        self.worker.lose("the server has lost its weights, and ends")

    # ---- the routes

    async def generate(self, request: Request) -> Response:
        """POST /generate."""
        client = client_of(request.client.host) if request.client else ""
        self._check_room(client)  # before a body is read
        order = await self._read(
            request, client, lambda body: read_order(body, self.limits, self.pipe.config, self.offers)
        )
        self._check_room(client)
        if self.log_prompts:
            log.info("%s: %r", client, order.jobs[0].prompt)
        task = self.worker.submit(self.drawer.work_for(order), client, order.size)
        return await answer(task, request, len(order.jobs))

    async def parameters(self, request: Request) -> JSONResponse:
        """POST /parameters."""
        client = client_of(request.client.host) if request.client else ""
        return JSONResponse(await self._read(request, client, lambda body: recall(body, self.limits, self.facts)))

    async def _read(self, request: Request, client: str, reading: Callable[[bytes], Answer]) -> Answer:
        """What `reading` makes of the body. Large ones take turns."""
        body = Body(request, self.limits.max_body)
        if await body.read(SMALL_BODY):
            return await self._in_turn(body, reading)
        async with self._uploads.place(client):
            await body.read(self.limits.max_body)
            return await self._in_turn(body, reading)

    async def _in_turn(self, body: Body, reading: Callable[[bytes], Answer]) -> Answer:
        """One at a time: what is read can be much larger than its JSON, for the moment."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, reading, bytes(body.data))

    def _check_room(self, client: str) -> None:
        if self.worker.room_for(client):
            return
        if self.worker.ending:
            raise HTTPException(503, ENDING, {"Retry-After": "10", "Connection": "close"})
        wait = self.worker.come_back(client)
        message = f"the queue is full ({self.worker.waiting} waiting); try again in {wait} seconds"
        raise HTTPException(503, message, {"Retry-After": str(wait)})

    async def healthz(self) -> JSONResponse:
        """GET /healthz. ready: a request would be taken now."""
        config, worker = self.pipe.config, self.worker
        state = {"ready": worker.room_for(""), "drawing": worker.running, "queue": worker.waiting}
        model = {name: self.facts.get(name) for name in ("model", "checkpoint", "device", "dtype", "opt")}
        size = {"image_size": config.image_size, "size_multiple": config.size_multiple}
        return JSONResponse({**state, **model, **size, "limits": asdict(self.limits)})

    async def text_of_metrics(self) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def page(self) -> HTMLResponse:
        """GET /."""
        return HTMLResponse(self.html)

    # ---- what is no route

    async def failed(self, request: Request, error: FailedError) -> Response:
        """Not a plain function: that would be called in a thread."""
        return refusal(error.status, str(error))

    async def http_error(self, request: Request, error: HTTPException) -> Response:
        """OPTIONS too, which no route has: it is the list that an answer of 405 brings along."""
        if error.status_code != 405 or request.scope["path"] not in self.routes:
            return refusal(error.status_code, error.detail, error.headers)
        method, _ = self.routes[request.scope["path"]]
        allow = {"Allow": "GET, HEAD, OPTIONS" if method == "GET" else f"{method}, OPTIONS"}
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=allow)
        return refusal(405, f"{request.scope['path']} takes {allow['Allow']}", allow)

    def answered(self, path: str, status: int, seconds: float) -> None:
        self.metrics.answered(path if path in self.routes else "other", status, seconds)

    def told(self, error: Exception) -> None:
        """Into the log."""
        log.error("this failed: %s", fault(error, self.log_prompts))

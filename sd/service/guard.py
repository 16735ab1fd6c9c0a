"""Before the app: who may ask, what browsers are told of the answers, and what is written down of each request."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sd.service.access import BasicAuth, Lockout, client_of, host_name
from sd.service.answers import refusal
from sd.service.logs import access_line

log = logging.getLogger(__name__)
access_log = logging.getLogger("sd.service.access")

LEFT = 499
"""The status of a request whose client left, in the log: nobody reads it."""

Seen = Callable[[str, int, float], object]
"""Is told of each request: path, status, seconds."""


class Gate:
    """Who may ask. hosts: the names that the Host header may have, None: any; auth: None lets everybody in."""

    def __init__(self, auth: BasicAuth | None, hosts: Collection[str] | None, lockout: Lockout):
        self.auth = auth
        self.hosts = hosts
        self.lockout = lockout

    async def refusal(self, headers: Headers, client: str) -> JSONResponse | None:
        if self.hosts is not None and host_name(headers.get("host", "")) not in self.hosts:
            return refusal(403, "this server does not answer to that host name")
        if self.auth is None:
            return None
        if "authorization" not in headers:
            return self._asks_for_password()
        if left := self.lockout.seconds_left(client):
            wait = str(math.ceil(left))
            return refusal(429, f"too many wrong passwords; try again in {wait} seconds", {"Retry-After": wait})
        if not self.auth.accepts(headers["authorization"]):
            await asyncio.sleep(self.lockout.wrong(client))
            return self._asks_for_password()
        self.lockout.right(client)
        return None

    def _asks_for_password(self) -> JSONResponse:
        challenge = {"WWW-Authenticate": 'Basic realm="Stable Diffusion", charset="UTF-8"'}
        return refusal(401, "a user name and a password are needed", challenge)


class Guard:
    """ASGI middleware: asks the gate, adds headers for browsers, logs a line a request, and answers faults."""

    def __init__(self, app: ASGIApp, gate: Gate, policy: str, queue: Callable[[], int], seen: Seen, on_fault: Callable):
        self.app = app
        self.gate = gate
        self.queue = queue
        self.seen = seen
        self.on_fault = on_fault
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
        start, client = time.perf_counter(), client_of(scope["client"][0]) if scope.get("client") else ""
        answer = Answer(send, self.headers)
        try:
            await self._answer(scope, receive, answer, client)
        finally:
            seconds = time.perf_counter() - start
            self.seen(scope["path"], answer.status, seconds)
            line = access_line(client, scope["method"], scope["path"], answer.status, seconds, self.queue())
            access_log.info("%s", line)

    async def _answer(self, scope: Scope, receive: Receive, answer: "Answer", client: str) -> None:
        try:
            refused = await self.gate.refusal(Headers(scope=scope), client)
            await (refused or self.app)(scope, receive, answer)
        except ClientDisconnect:
            return
        except Exception as error:
            self.on_fault(error)
            if not answer.started:
                await refusal(500, "this failed; the server's log says why")(scope, receive, answer)
        if not answer.ended:
            answer.status = LEFT


class Answer:
    """Passes an answer on, with more headers, and knows how far it is."""

    def __init__(self, send: Send, headers: dict[str, str]):
        self.send = send
        self.headers = headers
        self.started = False
        self.ended = False
        self.status = LEFT

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            MutableHeaders(scope=message).update(self.headers)
        self.ended = message["type"] == "http.response.body" and not message.get("more_body")
        await self.send(message)

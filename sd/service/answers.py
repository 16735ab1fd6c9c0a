"""Between HTTP and tasks: how a body is read, and in which form a task's pictures are answered."""

import asyncio
import base64
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from sd.service.worker import Event, FailedError, Task

PNG, JSON, NDJSON = "image/png", "application/json", "application/x-ndjson"

SLOWEST_UPLOAD = 30.0
"""Seconds in which a request's body must have arrived."""

SMALL_BODY = 2**16
"""Bytes. Only so many wait to become a whole body, but for a few that are larger."""

LARGE_BODIES, LARGE_BODIES_OF_CLIENT = 4, 2
"""Which are read at once, of all clients and of one."""

LONGEST_CUT = 1000
"""Characters of what a prompt's end was cut off, in a header."""

MOST_UNKNOWN, LONGEST_WORD = 8, 60
"""Words that a model has not learned, and characters of each, in a header."""

_OF_PICTURES = ("png", "parameters", "times", "cut", "unknown")
"""What the answer has of a picture's event."""


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """One readable line, whatever is wrong."""
    return JSONResponse({"error": " ".join(message.split())}, status, headers)


# ---- bodies


class Uploads:
    """Large bodies take turns, so that memory is that of a few."""

    def __init__(self):
        self._counts: Counter[str] = Counter()
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def place(self, client: str) -> AsyncIterator[None]:
        """Raises FailedError if none is free in the time that a body may take."""
        try:
            async with asyncio.timeout(SLOWEST_UPLOAD), self._changed:
                await self._changed.wait_for(lambda: self._has_room(client))
                self._counts[client] += 1
        except TimeoutError:
            raise FailedError(503, "too many pictures are being uploaded; try again in a while") from None
        try:
            yield
        finally:
            async with self._changed:
                self._counts[client] -= 1
                self._counts += Counter()  # without those that have none
                self._changed.notify_all()

    def _has_room(self, client: str) -> bool:
        return self._counts.total() < LARGE_BODIES and self._counts[client] < LARGE_BODIES_OF_CLIENT


class Body:
    """A request's body as it comes: JSON by its header, and at most so many bytes.

    Other pages' forms cannot send that header unasked.
    """

    def __init__(self, request: Request, most: int):
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            raise FailedError(415, "send JSON, with the header Content-Type: application/json")
        length = request.headers.get("content-length", "")
        self.most = most
        self.data = bytearray()
        self._chunks = request.stream()
        if length.isdecimal() and int(length[:20]) > most:
            self._too_long()

    async def read(self, until: int) -> bool:
        """Read on until there are more bytes than that; returns whether that was all. Raises FailedError."""
        try:
            async with asyncio.timeout(SLOWEST_UPLOAD):
                async for chunk in self._chunks:
                    self.data += chunk
                    if len(self.data) > self.most:
                        self._too_long()
                    if len(self.data) > until:
                        return False
        except TimeoutError:
            raise FailedError(408, f"the body did not arrive within {SLOWEST_UPLOAD:.0f} seconds") from None
        return True

    def _too_long(self) -> None:
        raise FailedError(413, f"the body must be at most {self.most} bytes")


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


async def answer(task: Task, request: Request, pictures: int) -> Response:
    """What the Accept header asks for. Raises FailedError."""
    kind = answer_type(request.headers.get("accept", ""), pictures)
    if kind == NDJSON:
        return Lines(task)
    drawn = await _pictures_of(task, request)
    if kind == JSON:
        return Response(to_json({"pictures": drawn}), media_type=JSON)
    return Response(drawn[0]["png"], media_type=PNG, headers=_told(drawn[0]))


def _told(picture: Event) -> dict[str, str]:
    """In JSON of ASCII. X-Cut, a list: what of the prompts was not read. X-Unknown: words that the model has not
    learned, each with a list of those that are near."""
    cut = [text[:LONGEST_CUT] for text in picture.get("cut", ())]
    unknown = dict(list(picture.get("unknown", {}).items())[:MOST_UNKNOWN])
    headers = {"X-Cut": cut, "X-Unknown": {word[:LONGEST_WORD]: near for word, near in unknown.items()}}
    return {name: json.dumps(value) for name, value in headers.items() if value}


async def _pictures_of(task: Task, request: Request) -> list[Event]:
    """The task's pictures when all are drawn. Cancels it when the client leaves. Raises FailedError."""
    pictures = []
    try:
        async for event in task.events():
            if await request.is_disconnected():
                raise FailedError(499, "the client left")
            if event["event"] == "error":
                raise FailedError(event["status"], event["error"])
            if event["event"] == "picture":
                pictures.append({name: event[name] for name in _OF_PICTURES if name in event})
    finally:
        task.cancel()
    return pictures

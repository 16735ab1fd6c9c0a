"""The connections of one server: how many there may be, and how long each may keep the others waiting.

uvicorn speaks HTTP; its protocol is given the limits here that it has none for. A connection that waits for a request
costs nothing but its place, and loses that to a newcomer when there is no other: so whoever opens hundreds and says
nothing, or one byte a second, keeps nobody out.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Collection

import h11
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol

from sd.service.access import client_of

HEAD_SECONDS = 10.0
"""In which all of a request's head has to be there, from the connection or from the last answer on."""

IDLE_SECONDS = 5
"""After which a connection on which nothing comes after an answer is closed."""

READER_SECONDS, READER_BYTES = 30.0, 30 * 2**10
"""Who does not take so many bytes of an answer that waits, within so many seconds, has stopped reading."""

SECOND_PROBE = 0.1
"""Seconds after a client has sent its last byte: whether it is still there is seen by the second thing sent to it."""

TOLD, TOLD_SECONDS = 32, 2.0
"""Connections over the limit that are told so, and how long they have to ask; any more are closed without a word."""


class Connections:
    """All that are open. most: in all; most_of_client: of one client, but for the proxies, which speak for many."""

    def __init__(self, most: int, most_of_client: int, proxies: Collection[str] = ()):
        self.most = most
        self.most_of_client = most_of_client
        self.proxies = {client_of(proxy) for proxy in proxies}
        self.turned_away = 0
        self._open: dict[Connection, str] = {}  # in the order in which they came, with their clients

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, connection: "Connection") -> None:
        """Take it up; where there is no place, the oldest one that waits for a request makes room, or it is refused."""
        client = client_of(connection.client[0] if connection.client else "")
        self._open[connection] = client
        counted = Counter(self._open.values())
        if counted[client] > self.most_of_client and client not in self.proxies:
            self._make_room(connection, [client])
        elif len(self._open) > self.most:
            self._make_room(connection, [one for one, _ in counted.most_common()])

    def _make_room(self, newcomer: "Connection", clients: list[str]) -> None:
        """Close the oldest that waits for a request, of the first client that has one."""
        self.turned_away += 1
        for client in clients:
            waiting = (one for one, of in self._open.items() if of == client and one is not newcomer and not one.busy)
            if (oldest := next(waiting, None)) is not None:
                self.leave(oldest)
                oldest.transport.abort()
                return
        if sum(one.refused for one in self._open) < TOLD:
            newcomer.refuse()
        else:
            self.leave(newcomer)
            newcomer.transport.abort()

    def leave(self, connection: "Connection") -> None:
        self._open.pop(connection, None)

    def sweep(self, now: float) -> None:
        """End those that are too slow; to be called about each second."""
        for connection in list(self._open):
            connection.tend(now)


class Connection(H11Protocol):
    """One connection, with a deadline for all that its client has to do."""

    def __init__(self, crowd: Connections, **given: object):
        super().__init__(**given)
        self.crowd = crowd
        self.refused = False
        self._waits_since = time.monotonic()
        self._unread: tuple[float, int] | None = None  # since when, and how many bytes then
        self._half_closed = False  # its client has sent its last byte

    @property
    def busy(self) -> bool:
        """Whether a request is being answered: its head is there, and its answer not yet written."""
        return self.cycle is not None and not self.cycle.response_complete

    def refuse(self) -> None:
        self.refused = True
        self.app = _no_place

    # ---- what uvicorn and asyncio call

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.crowd.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.crowd.leave(self)
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._waits_since = time.monotonic()
        super().on_response_complete()

    def eof_received(self) -> bool:
        """A client that has sent all of its request may still read: True keeps the connection for the answer."""
        if not self.busy or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        self._half_closed = True
        self._probe()
        self.loop.call_later(SECOND_PROBE, self._probe)
        return True

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, also in the middle of a body that is being read."""
        if self.busy:
            self.cycle.disconnected = True  # its request will never be whole
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._last_words(400, "this is no HTTP request")
        else:
            self.transport.abort()

    # ---- deadlines

    def tend(self, now: float) -> None:
        """End it, if it is too slow."""
        if self._stopped_reading(now):
            self.transport.abort()
        elif self._half_closed:
            self._probe()
        elif not self.busy and not self.transport.is_closing():
            waited = now - self._waits_since
            if waited > (TOLD_SECONDS if self.refused else HEAD_SECONDS):
                self._too_slow()

    def _stopped_reading(self, now: float) -> bool:
        size = self.transport.get_write_buffer_size()
        if size == 0:
            self._unread = None
        elif self._unread is None or size > self._unread[1] or size <= self._unread[1] - READER_BYTES:
            self._unread = now, size
        return self._unread is not None and now - self._unread[0] > READER_SECONDS

    def _probe(self) -> None:
        """To a client that has hung up this cannot be sent. To all others `100 Continue` says nothing."""
        begun = self.conn.our_state is not h11.SEND_RESPONSE
        if begun or self.cycle.scope["http_version"] == "1.0" or self.transport.is_closing():
            return
        self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[], reason="Continue")))

    def _too_slow(self) -> None:
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._last_words(408, f"the request's head did not arrive within {HEAD_SECONDS:.0f} seconds")
        else:
            self.transport.abort()

    def _last_words(self, status: int, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


async def _no_place(scope: dict, receive: object, send: object) -> None:
    """The ASGI app of those for whom there is no place."""
    body = b'{"error": "too many connections are open; try again in 10 seconds"}'
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"retry-after", b"10")]
    await send({"type": "http.response.start", "status": 503, "headers": [*headers, CLOSE_HEADER]})
    await send({"type": "http.response.body", "body": body, "more_body": False})

"""uvicorn around the app: with limits for connections, and an end that finishes what is drawn."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import uvicorn
from fastapi import FastAPI

from sd.service.connections import IDLE_SECONDS, TOLD, Connection, Connections
from sd.service.orders import Limits

log = logging.getLogger(__name__)

ACCEPTED_AT_ONCE = 32
"""Connections that asyncio accepts before any of them is looked at. It calls this backlog."""

BACKLOG = 1024
"""Those that wait in the system to be accepted."""

SPARE_FILES = 32 + TOLD + ACCEPTED_AT_ONCE
"""Descriptors that no connection takes: for pictures, and for connections too many that are on their way out."""

LAST_ANSWERS = 5
"""Seconds in which answers that are there are taken, at the end."""


class Server(uvicorn.Server):
    """Answers on sockets until `should_exit`; then finishes what is drawn, for at most `grace` seconds.

    proxies: whose X-Forwarded-For says who the client is. Signals are left to whoever runs it.
    """

    def __init__(self, app: FastAPI, limits: Limits, grace: float = 30.0, proxies: Sequence[str] = ()):
        self.connections = Connections(_affordable(limits.max_connections), limits.max_client_connections, proxies)
        self.service = app.state.service
        self.grace = grace
        self._told = 0
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Connection, self.connections),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                forwarded_allow_ips=list(proxies),
                backlog=ACCEPTED_AT_ONCE,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=LAST_ANSWERS,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(BACKLOG)

    async def on_tick(self, counter: int) -> bool:
        """Each tenth of a second."""
        if counter % 5 == 0:
            self.connections.sweep(time.monotonic())
        if counter % 100 == 0:
            self._tell()
        return await super().on_tick(counter) or bool(self.service.lost)

    def _tell(self) -> None:
        if more := self.connections.turned_away - self._told:
            self._told += more
            log.warning("%d connections too many in 10 s; %d are open", more, len(self.connections))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """While a drawing is finished, connections are still taken: what they ask for is refused in words."""
        log.info("ending: what is drawn is finished, for at most %g seconds", self.grace)
        ending = asyncio.ensure_future(self.service.end(self.grace))
        while not ending.done():
            self.connections.sweep(time.monotonic())
            await asyncio.wait([ending], timeout=0.5)
        await super().shutdown(sockets)


def _affordable(most: int) -> int:
    """As many connections as this process may have open files for."""
    try:
        import resource

        may = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        affordable = max(1, may - len(os.listdir("/dev/fd")) - SPARE_FILES)
    except (ImportError, OSError):  # Windows
        return most
    if affordable < most:
        log.warning("%d connections at most: this process may have %d files open (ulimit -n)", affordable, may)
    return min(most, affordable)

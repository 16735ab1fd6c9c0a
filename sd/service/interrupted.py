"""An end in words where another program runs the app, as Modal does: a machine that is taken away interrupts it."""

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]


class EndsInWords:
    """The app, for an event loop in the main thread. At SIGINT what is drawn is finished within `grace` seconds.

    All others are told, with 503 and Retry-After, that they may ask again; only then is the interrupt what it was: by
    itself, the program around would cancel all requests, and their clients would hear nothing.
    """

    def __init__(self, app: "FastAPI", grace: float = 15.0):
        self.app = app
        self.grace = grace
        self._ending: asyncio.Task | None = None
        self._listens = False

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] == "http" and not self._listens:  # not before: who runs the loop installs its own until then
            self._listens = True
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._interrupted)
        await self.app(scope, receive, send)

    def _interrupted(self) -> None:
        if self._ending is None:
            log.warning("interrupted: what is drawn is finished, for at most %g seconds", self.grace)
            self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        try:
            await self.app.state.service.end(self.grace)
            await asyncio.sleep(0.5)  # for the last answers to leave
        finally:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)  # a KeyboardInterrupt again
            os.kill(os.getpid(), signal.SIGINT)

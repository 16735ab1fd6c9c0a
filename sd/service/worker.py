"""One GPU draws one thing at a time: one thread, a bounded queue before it, and a way out for clients that leave.

Nothing here knows pictures or HTTP. Tasks are made in an event loop, run in the thread, and report back into the loop.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor

log = logging.getLogger(__name__)

Event = dict[str, object]
Report = Callable[[Event], None]
Work = Callable[[Report], None]
"""What a task does. It calls report(event) as often as it can: that is where it is stopped when its client has left."""

HEARTBEAT = 1.0
"""Seconds without an event after which a task says how many are before it: its client sees that the server is alive."""

FINAL = ("done", "error")


class LeftError(Exception):
    """The client is gone; raised in the work to end it."""


class FailedError(Exception):
    """Work that cannot be done, with an HTTP status and a line for the client."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Task:
    """Work on its way through the queue, and what it reports."""

    def __init__(self, worker: "Worker", work: Work):
        self.worker = worker
        self.work = work
        self.future: Future | None = None
        self._left = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    async def events(self) -> AsyncIterator[Event]:
        """What `work` reports, then {"event": "done"} or "error" with `error` and `status`; heartbeats in between."""
        yield self._heartbeat()
        event: Event = {}
        while event.get("event") not in FINAL:
            try:
                event = await asyncio.wait_for(self._events.get(), HEARTBEAT)
            except TimeoutError:
                event = self._heartbeat()
            yield event

    def cancel(self) -> None:
        """Give the place in the queue back; work that runs ends at its next report. Harmless when all is done."""
        first_time = not self._left.is_set()
        self._left.set()
        if first_time and self.future.cancel():
            self.worker.forget(self)

    def run(self) -> None:
        """In the worker's thread. The place is free before the last event says so, for a client that asks at once."""
        final = self._outcome()
        self.worker.forget(self)
        if not self._left.is_set():
            self._post(final)

    def _outcome(self) -> Event:
        try:
            self.work(self._report)
        except LeftError:
            log.info("stopped: the client left")
        except FailedError as error:
            return {"event": "error", "status": error.status, "error": str(error)}
        except Exception:
            log.exception("a task failed")
            return {"event": "error", "status": 500, "error": "this failed; the server's log says why"}
        return {"event": "done"}

    def _report(self, event: Event) -> None:
        if self._left.is_set():
            raise LeftError
        self._post(event)

    def _post(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _heartbeat(self) -> Event:
        return {"event": "waiting", "before": self.worker.before(self)}


class Worker:
    """The thread and its queue: one task runs, at most `most_waiting` more wait."""

    def __init__(self, most_waiting: int):
        self.most_waiting = most_waiting
        self._tasks: list[Task] = []  # in order; the first one runs
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draw")

    def submit(self, work: Work) -> Task:
        """Queue work, in an event loop and after `has_room` without an await between: other threads only make room."""
        assert self.has_room
        task = Task(self, work)
        self._tasks.append(task)
        task.future = self._thread.submit(task.run)
        return task

    @property
    def has_room(self) -> bool:
        return len(self._tasks) <= self.most_waiting

    @property
    def waiting(self) -> int:
        return max(0, len(self._tasks) - 1)

    @property
    def running(self) -> bool:
        return bool(self._tasks)

    def before(self, task: Task) -> int:
        tasks = list(self._tasks)
        return tasks.index(task) if task in tasks else 0

    def forget(self, task: Task) -> None:
        self._tasks.remove(task)

    def close(self) -> None:
        """Stop what runs at its next report and drop what waits."""
        for task in list(self._tasks):
            task.cancel()
        self._thread.shutdown(wait=False)

"""One GPU draws one thing at a time: one thread, a bounded queue before it, and a way out for clients that leave.

Nothing here knows pictures or HTTP. Tasks are made in an event loop, run in the thread, and report back into the loop.
Clients take turns; a client that found the queue full has a place kept for when it was told to come back.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

log = logging.getLogger(__name__)

Event = dict[str, object]
Report = Callable[[Event], None]
Work = Callable[[Report], None]
"""What a task does. It calls report(event) as often as it can: that is where it is stopped when its client has left."""

HEARTBEAT = 1.0
"""Seconds without an event after which a task says how many are before it: its client sees that the server is alive."""

FINAL = ("done", "error")

FIRST_GUESS = 10.0
"""Seconds to wait, before a request has been measured."""

LONGEST_WAIT = 600
"""Seconds that a client is told to wait, at most."""

REMEMBERED = 1000
"""Clients that were told to come back."""

ENDING = "the server is being stopped; try again in a while"


class LeftError(Exception):
    """The client is gone; raised in the work to end it."""


class FailedError(Exception):
    """Work that cannot be done, with an HTTP status and a line for the client."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Task:
    """Work on its way through the queue, and what it reports.

    size: how much it is, beside others. turn: those of a lower one run before it.
    """

    def __init__(self, worker: "Worker", work: Work, size: float, turn: int):
        self.worker = worker
        self.work = work
        self.size = size
        self.turn = turn
        self.started: float | None = None
        self._left = threading.Event()
        self._ended = threading.Event()
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
        self._left.set()
        self.worker.drop(self)

    def end(self) -> None:
        """As `cancel`, but the client is there and is told: the server ends."""
        self._ended.set()
        if self.worker.drop(self):
            self._post(_failed(503, ENDING))

    def fail(self, message: str) -> None:
        """The client is there, and is told why nothing comes."""
        self._post(_failed(503, message))

    def run(self) -> None:
        """In the worker's thread. The place is free before the last event says so, for a client that asks at once."""
        final = self._outcome()
        self.worker.finished(self, final["event"] == "done")
        if not self._left.is_set():
            self._post(final)

    def _outcome(self) -> Event:
        try:
            self.work(self._report)
        except LeftError:
            return _failed(499, "the client left")
        except FailedError as error:
            return _failed(error.status, str(error))
        except Exception as error:
            self.worker.on_fault(error)
            return _failed(500, "this failed; the server's log says why")
        return {"event": "done"}

    def _report(self, event: Event) -> None:
        if self._left.is_set():
            raise LeftError
        if self._ended.is_set():
            raise FailedError(503, ENDING)
        self._post(event)

    def _post(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _heartbeat(self) -> Event:
        return {"event": "waiting", "before": self.worker.before(self)}


def _failed(status: int, message: str) -> Event:
    return {"event": "error", "status": status, "error": message}


class Worker:
    """The thread and its queue: one task runs, at most `most_waiting` more wait.

    on_fault: is told of the errors of work that are nobody's but the server's.
    """

    def __init__(
        self,
        most_waiting: int,
        on_fault: Callable[[Exception], None] = lambda error: log.error("a task failed", exc_info=error),
        clock: Callable[[], float] = time.monotonic,
    ):
        self.most_waiting = most_waiting
        self.on_fault = on_fault
        self.ending = False
        self._clock = clock
        self._lock = threading.RLock()
        self._current: Task | None = None
        self._queue: list[Task] = []  # as they came
        self._turn = 0  # that runs, or ran last
        self._last_turns: dict[str, int] = {}  # of the clients that wait: of the last of their tasks
        self._kept: dict[
            str, float
        ] = {}  # clients in the order in which they were refused, until when they have to be back
        self._pace: float | None = None  # seconds of work of size 1
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draw")

    # ---- who may come

    def room_for(self, client: str) -> bool:
        """Whether a task of this client would be taken now. Half of the places, at most, are kept for others."""
        with self._lock:
            free = self.most_waiting + 1 - len(self._queue) - (self._current is not None)
            return not self.ending and free > self._kept_before(client)

    def _kept_before(self, client: str) -> int:
        now = self._clock()
        self._kept = {name: until for name, until in self._kept.items() if until > now}
        names = list(self._kept)
        ahead = names.index(client) if client in self._kept else len(names)
        return min(ahead, (self.most_waiting + 1) // 2)

    def come_back(self, client: str) -> int:
        """Keep a place for a client that found none: in how many seconds it is free, as far as can be said."""
        with self._lock:
            before = self._kept_before(client)
            wait = math.ceil(min(max(self._seconds_until_free(before), 1), LONGEST_WAIT))
            if client in self._kept or len(self._kept) < REMEMBERED:
                self._kept[client] = self._clock() + wait + max(5, wait)
            return wait

    def _seconds_until_free(self, before: int) -> float:
        """Until as many tasks are done as have to be: the one that runs, and one more for each client before."""
        if self._pace is None:
            return FIRST_GUESS
        size = sum(task.size for task in self._in_order()[:before])
        if self._current is None:
            return self._pace * size
        return self._pace * size + max(0.0, self._pace * self._current.size - (self._clock() - self._current.started))

    # ---- the queue

    def submit(self, work: Work, client: str = "", size: float = 1.0) -> Task:
        """Queue work, in an event loop and after `room_for` without an await between: other threads only make room."""
        with self._lock:
            assert self.room_for(client)
            self._kept.pop(client, None)
            task = Task(self, work, size, self._next_turn(client))
            self._queue.append(task)
        self._thread.submit(self._run_next)
        return task

    def _run_next(self) -> None:
        """In the thread. Nothing is left where a task was dropped."""
        with self._lock:
            if not self._queue:
                return
            task = self._current = self._in_order()[0]
            self._queue.remove(task)
            self._turn = max(self._turn, task.turn)
            self._last_turns = {name: turn for name, turn in self._last_turns.items() if turn > self._turn}
            task.started = self._clock()
        task.run()

    def _next_turn(self, client: str) -> int:
        """Each client has a task a turn, and who comes now is not behind who waits with several (Goyal et al. 1996)."""
        self._last_turns[client] = max(self._turn, self._last_turns.get(client, 0)) + 1
        return self._last_turns[client]

    def _in_order(self) -> list[Task]:
        """Those that wait, as they will run."""
        return sorted(self._queue, key=lambda task: task.turn)

    @property
    def waiting(self) -> int:
        with self._lock:
            return max(0, len(self._queue) + (self._current is not None) - 1)

    @property
    def running(self) -> bool:
        return self._current is not None or bool(self._queue)

    def before(self, task: Task) -> int:
        with self._lock:
            order = self._in_order()
            return order.index(task) + (self._current is not None) if task in order else 0

    def drop(self, task: Task) -> bool:
        """Take it out of those that wait, if it does."""
        with self._lock:
            waits = task in self._queue
            if waits:
                self._queue.remove(task)
            return waits

    def finished(self, task: Task, done: bool) -> None:
        with self._lock:
            self._current = None
            if not done:
                return
            pace = (self._clock() - task.started) / task.size
            self._pace = pace if self._pace is None else 0.7 * self._pace + 0.3 * pace

    # ---- the end

    def end(self, at_once: bool = False) -> None:
        """Take nothing new, and tell all that wait. What runs is finished; at_once: stopped at its next report."""
        with self._lock:
            self.ending = True
            for task in list(self._queue):
                task.end()
            if at_once and self._current is not None:
                self._current.end()

    def lose(self, message: str) -> None:
        """The thread will do nothing any more: tell all clients, the one that it worked for too."""
        with self._lock:
            self.ending = True
            lost, self._current = self._current, None
            for task in [*self._queue, *([lost] if lost else [])]:
                task.fail(message)
            self._queue.clear()

    def close(self) -> None:
        """Stop what runs at its next report and drop what waits."""
        self.end(at_once=True)
        self._thread.shutdown(wait=False)

"""Whose turn it is, who is taken up, and how long the others are told to wait."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from sd.service.worker import ENDING, FailedError, Report, Task, Worker


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Held:
    """Work that runs until it is let go; what ran is written down."""

    def __init__(self):
        self.ran: list[str] = []
        self.begun = threading.Semaphore(0)
        self.let_go = threading.Semaphore(0)

    def __call__(self, name: str) -> Callable[[Report], None]:
        def work(report: Report) -> None:
            self.ran.append(name)
            self.begun.release()
            while not self.let_go.acquire(timeout=0.01):
                report({"event": "step"})

        return work


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


async def last(task: Task) -> dict:
    found = {}
    async for event in task.events():
        found = event
    return found


async def began(held: Held) -> None:
    await asyncio.to_thread(held.begun.acquire)


def test_clients_take_turns():
    async def run() -> None:
        worker, held = Worker(10), Held()
        tasks = [worker.submit(held(f"a{i}"), "a") for i in range(3)]
        await began(held)
        tasks += [worker.submit(held(f"b{i}"), "b") for i in range(2)]
        tasks += [worker.submit(held("c0"), "c"), worker.submit(held("a3"), "a")]
        assert [worker.before(task) for task in tasks] == [0, 1, 4, 2, 5, 3, 6]
        held.let_go.release(10)
        await asyncio.gather(*map(last, tasks))
        assert held.ran == ["a0", "a1", "b0", "c0", "a2", "b1", "a3"]
        worker.close()

    in_loop(run)


def test_new_clients_do_not_starve_one_that_waits_with_several():
    async def run() -> None:
        worker, held = Worker(100), Held()
        waiting = [worker.submit(held(f"a{i}"), "a") for i in range(3)]
        for number in range(20):
            await began(held)
            waiting.append(worker.submit(held(f"new{number}"), f"client {number}"))
            held.let_go.release()
            while len(held.ran) < number + 2:
                await asyncio.sleep(0.001)
        assert held.ran.index("a2") < 8
        worker.close()

    in_loop(run)


def test_one_that_found_no_place_has_one_kept():
    async def run() -> None:
        clock, held = Clock(), Held()
        worker = Worker(3, clock=clock)
        tasks = [worker.submit(held(name), "greedy") for name in "abcd"]
        await began(held)
        assert not worker.room_for("polite")
        wait = worker.come_back("polite")
        held.let_go.release()
        await last(tasks[0])
        assert not worker.room_for("greedy"), "it is the other's"
        clock.now += wait
        assert worker.room_for("polite")
        worker.submit(held("e"), "polite")
        assert not worker.room_for("polite"), "one place was kept, not two"
        await began(held)
        held.let_go.release()
        await last(tasks[1])
        assert worker.room_for("greedy"), "and it is kept no more"
        worker.close()

    in_loop(run)


def test_a_place_is_kept_for_a_while_only_and_half_of_them_at_most():
    clock = Clock()
    worker = Worker(3, clock=clock)
    waits = [worker.come_back(f"gone {number}") for number in range(50)]
    assert worker.room_for("new"), "two of four are kept"
    assert worker.room_for("gone 49")
    clock.now += 2 * max(waits) + 6
    assert worker.room_for("new")
    assert worker._kept == {}


def test_no_place_is_kept_where_there_is_one_only():
    worker = Worker(0)
    worker.come_back("gone")
    assert worker.room_for("new")


def test_how_long_to_wait_is_what_is_before_one():
    async def run() -> None:
        clock, held = Clock(), Held()
        worker = Worker(3, clock=clock)
        first = worker.submit(held("first"), "a", size=10)
        await began(held)
        assert worker.come_back("b") == 10, "a guess, before anything was measured"
        clock.now += 40
        held.let_go.release()
        await last(first)  # 4 seconds for each of size 1
        tasks = [worker.submit(held(str(size)), "a", size) for size in (5, 2, 1)]
        await began(held)
        clock.now += 6
        assert worker.come_back("b") == 14, "the one that runs"
        assert worker.come_back("c") == 14 + 8, "and the next, since b is before c"
        assert worker.come_back("b") == 14, "who asks again keeps the place"
        for task in tasks:
            task.cancel()
        clock.now += 1000
        while worker.running:
            await asyncio.sleep(0.001)
        worker.submit(held("last"), "a", size=3)
        await began(held)
        assert worker.come_back("d") == 12, "what was not finished says nothing of how long one takes"
        worker.close()

    in_loop(run)


def test_what_is_dropped_leaves_its_place():
    async def run() -> None:
        worker, held = Worker(2), Held()
        first, second, third = (worker.submit(held(name), "a") for name in "abc")
        await began(held)
        assert (worker.waiting, worker.room_for("b")) == (2, False)
        second.cancel()
        second.cancel()
        assert (worker.waiting, worker.room_for("b"), worker.before(third)) == (1, True, 1)
        held.let_go.release(3)
        await asyncio.gather(last(first), last(third))
        assert (held.ran, worker.running) == (["a", "c"], False)
        third.cancel()
        worker.close()

    in_loop(run)


def test_at_the_end_what_runs_is_finished_and_the_others_are_told():
    async def run() -> None:
        worker, held = Worker(3), Held()
        running, waiting = worker.submit(held("a"), "a"), worker.submit(held("b"), "b")
        await began(held)
        worker.end()
        assert not worker.room_for("c")
        assert await last(waiting) == {"event": "error", "status": 503, "error": ENDING}
        held.let_go.release()
        assert await last(running) == {"event": "done"}
        assert held.ran == ["a"]

    in_loop(run)


def test_after_the_grace_what_runs_is_stopped_and_told():
    async def run() -> None:
        worker, held = Worker(3), Held()
        running = worker.submit(held("a"), "a")
        await began(held)
        worker.end(at_once=True)
        assert await last(running) == {"event": "error", "status": 503, "error": ENDING}
        assert not worker.running

    in_loop(run)


def test_errors_are_the_clients_or_the_servers():
    faults: list[Exception] = []

    def failing(error: Exception) -> Callable[[Report], None]:
        def work(report: Report) -> None:
            raise error

        return work

    async def run() -> None:
        worker = Worker(3, faults.append)
        assert (await last(worker.submit(failing(FailedError(422, "no"))))) == {
            "event": "error",
            "status": 422,
            "error": "no",
        }
        assert faults == []
        final = await last(worker.submit(failing(ZeroDivisionError())))
        assert (final["status"], [type(fault) for fault in faults]) == (500, [ZeroDivisionError])
        worker.close()

    in_loop(run)


def test_no_more_is_taken_than_there_is_room_for():
    async def run() -> None:
        worker, held = Worker(0), Held()
        worker.submit(held("a"), "a")
        with pytest.raises(AssertionError):
            worker.submit(held("b"), "b")
        worker.close()

    in_loop(run)

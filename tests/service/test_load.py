"""Under more than can be drawn: nothing is lost, nobody is kept out, nothing grows."""

import base64
import json
import os
import random
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sd.service.app import create_app
from sd.service.orders import Limits
from tests.service.support import JSON, NDJSON, PNG, Client, InstantPipe, serving, started
from tests.service.test_connections import HALF, opened, trickle

pytestmark = pytest.mark.full(memory=False)


# ---- the process from outside


class Process:
    """What Linux says of one."""

    def __init__(self, pid: int):
        self.folder = Path(f"/proc/{pid}")

    def _status(self, name: str) -> int:
        lines = (self.folder / "status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name + ":")).split()[1])

    @property
    def memory(self) -> float:
        """MB that are in use."""
        return self._status("VmRSS") / 1000

    @property
    def peak(self) -> float:
        return self._status("VmHWM") / 1000

    @property
    def threads(self) -> int:
        return self._status("Threads")

    @property
    def files(self) -> int:
        return len(os.listdir(self.folder / "fd"))


@pytest.fixture
def program(shallow_checkpoint, tmp_path) -> Iterator[Callable]:
    """Starts it with options; its log has to be read, or it would wait for that."""

    @contextmanager
    def start(*options: str) -> Iterator[tuple[Process, Client, list[str]]]:
        with started("--ckpt", str(shallow_checkpoint), *options, folder=tmp_path) as (process, client):
            log: list[str] = []
            reader = threading.Thread(target=lambda: log.extend(process.stderr), daemon=True)
            reader.start()
            yield Process(process.pid), client, log
            process.kill()
            reader.join(10)

    return start


# ---- for long


def hang_up(client: Client, rng: random.Random) -> None:
    with client.open("POST", "/generate", {"prompt": "x", "steps": 20}, accept=rng.choice([PNG, NDJSON])):
        pass


def leave(client: Client, rng: random.Random) -> None:
    """In the middle of the stream."""
    with client.open("POST", "/generate", {"prompt": "x", "steps": 150}, accept=NDJSON) as response:
        for _ in range(rng.randrange(4)):
            response.readline()


def break_off(client: Client, rng: random.Random) -> None:
    sock = opened(
        client.port, rng.choice([HALF, b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{", b""])
    )
    sock.close()


def ask(client: Client, rng: random.Random) -> None:
    values = {"prompt": "a fox", "steps": rng.randint(1, 4), "num_images": rng.randint(1, 2), "seed": rng.randint(0, 9)}
    accept = rng.choice([PNG, JSON, NDJSON])
    given = rng.choice([{}, {"preview": 1}, {"init_image": PICTURE}, {"prompt": "fox " * 90, "prompt_syntax": "plain"}])
    status, _, body = patiently(lambda: client.draw(accept, **{**values, **given}))
    assert (status, bool(body)) == (200, True)


def patiently(asked: Callable[[], tuple[int, dict, bytes]]) -> tuple[int, dict, bytes]:
    """The answer in the end, where there is no place now and then."""
    for _ in range(100):
        with suppress(OSError):
            answer = asked()
            if answer[0] != 503:
                return answer
        time.sleep(0.1)
    return 503, {}, b""


def wrong(client: Client, rng: random.Random) -> None:
    values = [{"steps": 0}, {"cfg_scale": 1e40}, {"init_image": "x"}, {"prompt": 3}, {"init_image": PICTURE[:90]}]
    assert patiently(lambda: client.draw(**rng.choice(values)))[0] == 422


def look(client: Client, rng: random.Random) -> None:
    assert client("GET", rng.choice(["/", "/healthz", "/metrics"]))[0] == 200


def picture(side: int, depth: int = 8) -> bytes:
    """A PNG that is one colour: 4096x4096 pixels of 16-bit RGBA are 130 KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + bytes([depth, 6, 0, 0, 0])
    row = b"\0" + bytes(side * 4 * depth // 8)
    squeezer = zlib.compressobj(9)
    data = b"".join(squeezer.compress(row) for _ in range(side)) + squeezer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


PICTURE = base64.b64encode(picture(64)).decode()
DOINGS = [ask] * 6 + [wrong, look, hang_up, leave, break_off]


def test_two_thousand_requests_leave_nothing_behind(program):
    with program() as (process, client, log):

        def do(number: int) -> None:
            rng = random.Random(number)
            rng.choice(DOINGS)(client, rng)

        def settled() -> tuple[int, int]:
            time.sleep(12)  # longer than any connection may idle
            while json.loads(client("GET", "/healthz")[2])["drawing"]:
                time.sleep(0.1)
            return process.files, process.threads

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(do, range(300)))  # what is made on first use is there
            before, memory = settled(), process.memory
            list(pool.map(do, range(300, 2300)))
            after = settled()
        assert after == before
        print(f"memory {memory:.0f} -> {process.memory:.0f} MB, (files, threads) {before} -> {after}")
        assert process.memory < memory + 30
    assert "Traceback" not in "".join(log)


# ---- many


def test_a_crowd_is_served_or_told_when_to_come_back(program):
    """400 clients at once, of which each comes back as it is told until it has its picture."""
    with program("--max-client-connections", "256") as (_, client, log):
        found: Counter[int] = Counter()

        def insist(number: int) -> bool:
            end = time.monotonic() + 240
            while time.monotonic() < end:
                try:
                    status, headers, body = client.draw(seed=number)
                except OSError:  # over 256 connections: closed without a word
                    time.sleep(1)
                    continue
                found[status] += 1
                if status == 200:
                    return body.startswith(b"\x89PNG")
                assert status == 503
                time.sleep(int(headers["retry-after"]) * random.uniform(1, 1.5))
            return False

        with ThreadPoolExecutor(400) as pool:
            assert all(pool.map(insist, range(400)))
        print(dict(found))
        assert found[200] == 400
    assert "Traceback" not in "".join(log)


def loop(client: Client, address: str, end: float, patient: bool) -> int:
    """Pictures that a client gets which asks again at once, or when it is told."""
    got = 0
    while time.monotonic() < end:
        status, headers, _ = client.draw(from_address=address)
        got += status == 200
        if status == 503 and patient:
            time.sleep(int(headers["retry-after"]))
    return got


def test_who_waits_politely_is_served_beside_twenty_who_do_not():
    with serving(create_app(InstantPipe(seconds=0.1), Limits())) as client, ThreadPoolExecutor(21) as pool:
        assert client.draw()[0] == 200  # how long one takes is known
        end = time.monotonic() + 20
        greedy = [pool.submit(loop, client, f"127.0.1.{number}", end, False) for number in range(1, 21)]
        polite = pool.submit(loop, client, "127.0.2.1", end, True).result()
        others = [one.result() for one in greedy]
    print(f"polite {polite}, the others {others}")
    assert polite >= 4
    assert sum(others) > 100, "and the server is not kept idle"


def test_one_who_asks_for_all_places_does_not_slow_the_others():
    with serving(create_app(InstantPipe(seconds=0.1), Limits())) as client, ThreadPoolExecutor(21) as pool:
        assert client.draw()[0] == 200  # how long one takes is known
        end = time.monotonic() + 10
        greedy = [pool.submit(loop, client, "127.0.1.1", end, False) for _ in range(20)]
        polite = pool.submit(loop, client, "127.0.2.1", end, True).result()
        print(f"one of one {polite}, one with twenty {sum(one.result() for one in greedy)}")
    assert polite >= 5


# ---- slow, and large


def test_slow_clients_of_every_kind_keep_nobody_out(program):
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON}\r\n".encode()
    head += b"Content-Length: 4000000\r\n\r\n"
    with program("--max-connections", "60", "--max-client-connections", "40") as (process, client, log):
        stop = threading.Event()

        def pester(sent: bytes) -> None:
            while not stop.is_set():
                try:
                    with opened(client.port, sent) as sock:
                        trickle(sock, 1)
                except OSError:
                    time.sleep(0.05)

        kinds = [HALF, b"", head + b'{"prompt": "', head + b'{"prompt": "' + b"x" * 100_000]
        with ThreadPoolExecutor(120) as pool:
            for number in range(120):
                pool.submit(pester, kinds[number % 4])
            try:
                time.sleep(1)
                statuses = Counter(patiently(client.draw)[0] for _ in range(30))
            finally:
                stop.set()
        assert statuses == {200: 30}
        assert process.files < 160
    assert "Traceback" not in "".join(log)


def test_twelve_large_pictures_at_once(program):
    """Decoded side by side, before they had a place in the queue, they took 2.4 GB."""
    upload = base64.b64encode(picture(4096, 16)).decode()
    assert len(upload) < 300_000
    with program("--max-queue", "12") as (process, client, _):
        assert client.draw(init_image=PICTURE)[0] == 200
        before = process.peak
        with ThreadPoolExecutor(12) as pool:
            statuses = list(pool.map(lambda seed: client.draw(seed=seed, init_image=upload)[0], range(12)))
        print(f"peak {before:.0f} -> {process.peak:.0f} MB")
        assert statuses == [200] * 12
        assert process.peak < before + 700

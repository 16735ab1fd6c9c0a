"""Clients that open many connections, or none of whose bytes come: they are ended, and keep nobody out."""

import asyncio
import base64
import http.client
import io
import json
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd.service import answers, connections
from sd.service.access import BasicAuth
from sd.service.answers import Uploads
from sd.service.app import create_app
from sd.service.connections import Connection, Connections
from sd.service.orders import Limits
from sd.service.worker import FailedError
from tests.service.support import JSON, NDJSON, Client, InstantPipe, WaitingPipe, event, serving

HALF = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: "


def opened(port: int, sent: bytes = b"", receive_buffer: int | None = None) -> socket.socket:
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(120)
    sock.connect(("127.0.0.1", port))
    sock.sendall(sent)
    return sock


def rest(sock: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    data = b""
    try:
        while more := sock.recv(2**16):
            data += more
    except ConnectionResetError:
        pass
    return data


def trickle(sock: socket.socket, seconds: float) -> bool:
    """A byte each 50 ms; returns whether the other side ended it within so many seconds."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            sock.sendall(b"x")
            time.sleep(0.05)
    except OSError:
        return True
    return False


def until(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- how many


class Peer:
    """A connection as Connections sees it."""

    def __init__(self, crowd: Connections, address: str, busy: bool = False):
        self.client, self.busy, self.transport = (address, 1), busy, self
        self.refused = self.aborted = False
        crowd.enter(self)

    def refuse(self) -> None:
        self.refused = True

    def abort(self) -> None:
        self.aborted = True


def test_a_newcomer_takes_the_place_of_the_clients_own_oldest_that_waits():
    crowd = Connections(10, 2)
    first, second, other = Peer(crowd, "10.0.0.1", busy=True), Peer(crowd, "10.0.0.1"), Peer(crowd, "10.0.0.2")
    third = Peer(crowd, "10.0.0.1")
    assert (first.aborted, second.aborted, third.aborted, other.aborted) == (False, True, False, False)
    assert len(crowd) == 3


def test_where_all_are_full_the_one_with_most_connections_makes_room():
    crowd = Connections(5, 5)
    honest, greedy = Peer(crowd, "10.0.0.1"), [Peer(crowd, "10.0.0.2") for _ in range(4)]
    Peer(crowd, "10.0.0.3")
    assert [one.aborted for one in (honest, *greedy)] == [False, True, False, False, False]


def test_where_none_waits_some_are_told_and_the_others_closed(monkeypatch):
    monkeypatch.setattr(connections, "TOLD", 2)
    crowd = Connections(2, 2)
    busy = [Peer(crowd, "10.0.0.1", busy=True) for _ in range(2)]
    more = [Peer(crowd, "10.0.0.2", busy=True) for _ in range(3)]
    assert [(one.refused, one.aborted) for one in more] == [(True, False), (True, False), (False, True)]
    assert not any(one.aborted or one.refused for one in busy)
    assert crowd.turned_away == 3


def test_a_proxy_speaks_for_many_and_a_customer_has_a_network_of_addresses():
    crowd = Connections(10, 1, ["10.0.0.9"])
    assert not any(one.aborted for one in [Peer(crowd, "10.0.0.9") for _ in range(4)])
    first, _ = Peer(crowd, "2001:db8:0:1::1"), Peer(crowd, "2001:db8:0:1::2")
    assert first.aborted
    mapped, _ = Peer(crowd, "::ffff:10.1.1.1"), Peer(crowd, "10.1.1.1")
    assert mapped.aborted


def test_half_heads_keep_nobody_out():
    limits = Limits(max_connections=20, max_client_connections=10)
    with serving(create_app(InstantPipe(), limits), limits) as client:
        slow = [opened(client.port, HALF) for _ in range(60)]
        assert client("GET", "/healthz")[0] == 200
        assert client.draw()[0] == 200
        assert len(client.server.connections) <= 11
        for sock in slow:
            sock.close()
        until(lambda: len(client.server.connections) == 0)


def test_a_place_that_is_not_there_is_told_in_words():
    limits = Limits(max_client_connections=2)
    pipe = WaitingPipe()
    with serving(create_app(pipe, limits), limits) as client:
        ask = ("POST", "/generate", {"prompt": "x"})
        with client.open(*ask, accept=NDJSON) as one, client.open(*ask, accept=NDJSON) as two:
            event(one), event(two)
            status, headers, body = client("GET", "/healthz")
            assert (status, headers["retry-after"], headers["connection"]) == (503, "10", "close")
            assert "too many connections" in json.loads(body)["error"]
            pipe.finish.release(2)


FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
from sd import serve
sys.exit(serve.main(sys.argv[1:]))
"""


def seconds_of(pid: int) -> float:
    """That a process has computed."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_fewer_open_files_than_connections(tiny_checkpoint):
    """The server that was kept from everybody by 200 half heads, and wrote 62 MB of tracebacks in 5 s."""
    line = [sys.executable, "-c", FEW_FILES, "--port", "0", "--ckpt", str(tiny_checkpoint), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SD_AUTH": "none"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, env=environment, **pipes) as process:
        try:
            port = int(process.stdout.readline().rstrip("/\n").rpartition(":")[2])
            slow = []
            for _ in range(300):
                slow.append(opened(port, HALF))
            assert Client(port)("GET", "/healthz")[0] == 200
            busy = seconds_of(process.pid)
            time.sleep(1)
            assert seconds_of(process.pid) - busy < 0.5, "it is busy with nothing"
        finally:
            process.kill()
        said = process.stderr.read()
    assert "files open" in said
    assert "Traceback" not in said
    assert len(said) < 10_000


# ---- how long


@pytest.fixture
def quick(monkeypatch) -> Iterator[Client]:
    """Deadlines of half a second, where there is a password."""
    for name in ("HEAD_SECONDS", "READER_SECONDS", "TOLD_SECONDS"):
        monkeypatch.setattr(connections, name, 0.5)
    monkeypatch.setattr(answers, "SLOWEST_UPLOAD", 0.5)
    with serving(create_app(InstantPipe(), auth=BasicAuth("a", "b"))) as client:
        yield client


def test_a_head_that_comes_too_slowly(quick):
    sock = opened(quick.port, HALF)
    assert trickle(sock, 120)
    assert rest(opened(quick.port, HALF)).startswith(b"HTTP/1.1 408 ")
    assert rest(opened(quick.port)) == b""


def test_a_body_after_the_answer_ends_with_the_next_heads_deadline(quick):
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n{"
    sock = opened(quick.port, head)
    assert sock.recv(2**16).startswith(b"HTTP/1.1 401 ")
    assert trickle(sock, 120)


def password(text: str = "a:b") -> str:
    return f"Basic {base64.b64encode(text.encode()).decode()}"


def test_a_body_that_comes_too_slowly(quick):
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nAuthorization: {password()}\r\n"
    for length in ("Content-Length: 100000\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n5\r\n"):
        assert rest(opened(quick.port, f"{head}{length}{{".encode())).startswith(b"HTTP/1.1 408 ")


def test_a_connection_is_kept_for_the_next_request_and_not_for_ever(quick):
    connection = http.client.HTTPConnection("127.0.0.1", quick.port, timeout=120)
    for _ in range(5):  # longer than a head may take
        connection.request("GET", "/healthz", headers={"Authorization": password()})
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (200, True)
        time.sleep(0.2)
    assert connection.sock.recv(1) == b""


def test_a_reader_that_stops_reading():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), dtype=np.uint8))
    with serving(create_app(InstantPipe(noise))) as client, pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "READER_SECONDS", 0.5)
        body = json.dumps({"prompt": "x"}).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nAccept: {JSON}\r\n"
        sock = opened(client.port, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body, 4096)
        until(lambda: len(client.server.connections) == 1)
        until(lambda: len(client.server.connections) == 0)
        assert len(rest(sock)) < 6_000_000
        assert client("GET", "/healthz")[0] == 200


class Buffer:
    """A transport, by the bytes that wait in it."""

    def __init__(self):
        self.size = 0

    def get_write_buffer_size(self) -> int:
        return self.size


def stopped(sizes: list[int], seconds: float) -> bool:
    """Whether a reader is given up on for whom so many bytes wait, in turn, so many seconds apart."""
    connection, buffer = Connection.__new__(Connection), Buffer()
    connection.transport, connection._unread = buffer, None
    found = False
    for number, size in enumerate(sizes):
        buffer.size = size
        found = found or connection._stopped_reading(number * seconds)
    return found


def test_who_reads_slowly_is_not_who_has_stopped():
    slow = list(range(4_000_000, 0, -50_000))
    assert not stopped(slow, 10)
    assert stopped([size // 50 for size in slow], 10)
    assert stopped([5000] * 10, 10)
    assert not stopped([5000, 0] * 10, 20)


def test_large_bodies_take_turns(monkeypatch):
    monkeypatch.setattr(answers, "SLOWEST_UPLOAD", 0.2)

    async def run() -> None:
        uploads = Uploads()
        async with uploads.place("a"), uploads.place("a"):
            with pytest.raises(FailedError, match="too many pictures"):
                await uploads.place("a").__aenter__()
            async with uploads.place("b"), uploads.place("c"):
                with pytest.raises(FailedError):
                    await uploads.place("d").__aenter__()
            async with uploads.place("d"):
                pass
        assert not uploads._counts

    asyncio.run(run())


def test_slow_uploads_keep_no_small_request_out():
    with serving(create_app(InstantPipe())) as client:
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nContent-Length: 1000000\r\n\r\n"
        slow = [opened(client.port, head.encode() + b'{"prompt": "' + b"x" * 100_000) for _ in range(12)]
        assert client.draw()[0] == 200
        for sock in slow:
            sock.close()


# ---- the last byte


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_sends_no_more_gets_its_answer(version):
    pipe = WaitingPipe()
    with serving(create_app(pipe)) as client:
        body = b'{"prompt": "half"}'
        head = (
            f"POST /generate HTTP/{version}\r\nHost: x\r\nContent-Type: {JSON}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        sock = opened(client.port, head.encode() + body)
        sock.shutdown(socket.SHUT_WR)
        assert pipe.began.get(timeout=120) == "half"
        with pytest.raises(queue.Empty):
            pipe.left.get(timeout=1.5)
        pipe.finish.release()
        answer = rest(sock)
    head, _, png = answer[answer.index(b"HTTP/1.1 200") :].partition(b"\r\n\r\n")
    assert Image.open(io.BytesIO(png)).size == (8, 8)
    assert (b"100 Continue" in answer) == (version == "1.1")


def hung_up(pipe: WaitingPipe, client: Client) -> bool:
    """Whether it is seen that a client that waits for a PNG has hung up."""
    connection = client.connection()
    connection.request("POST", "/generate", b'{"prompt": "gone"}', {"Content-Type": JSON})
    pipe.began.get(timeout=120)
    connection.close()
    return pipe.left.get(timeout=120) == "gone"


def test_who_hangs_up_is_told_from_who_sends_no_more_at_once_or_later(monkeypatch):
    with monkeypatch.context() as patch, serving(create_app(pipe := WaitingPipe())) as client:
        patch.setattr(Connections, "sweep", lambda *_: None)
        assert hung_up(pipe, client)
    with monkeypatch.context() as patch, serving(create_app(pipe := WaitingPipe())) as client:
        patch.setattr(connections, "SECOND_PROBE", 1000)
        assert hung_up(pipe, client)


def test_half_a_body_and_no_more(caplog):
    caplog.set_level(logging.INFO)
    with serving(create_app(InstantPipe())) as client:
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nContent-Length: 100\r\n\r\n"
        sock = opened(client.port, head.encode() + b'{"pro')
        sock.shutdown(socket.SHUT_WR)
        assert rest(sock) == b""
        until(lambda: "POST /generate 499" in caplog.text)
    assert "Traceback" not in caplog.text


BROKEN = [
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
]


@pytest.mark.parametrize("sent", BROKEN)
def test_what_is_no_http(sent, caplog):
    with serving(create_app(InstantPipe())) as client:
        answer = rest(opened(client.port, sent))
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"] == "this is no HTTP request"
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("accept", [JSON, NDJSON])
def test_a_body_that_breaks_off(caplog, accept):
    """The chunk's length is none: while the body is read, and behind an answer that has begun."""
    with serving(create_app(WaitingPipe())) as client:
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nAccept: {accept}\r\n"
        sock = opened(client.port, f"{head}Transfer-Encoding: chunked\r\n\r\n3\r\n{{}} \r\nzz\r\n".encode())
        assert rest(sock).startswith(b"HTTP/1.1 400 ")
        assert client("GET", "/healthz")[0] == 200
    assert "Traceback" not in caplog.text


def test_a_body_that_breaks_off_when_it_is_answered_already(caplog):
    caplog.set_level(logging.ERROR)
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with serving(create_app(InstantPipe(), Limits(max_body=10), auth=BasicAuth("a", "b"))) as client:
        sock = opened(client.port, head)
        assert sock.recv(2**16).startswith(b"HTTP/1.1 401 ")
        sock.sendall(b"zz\r\n")
        rest(sock)
    with serving(create_app(InstantPipe(), Limits(max_body=10))) as client:
        rest(opened(client.port, head + b"14\r\n" + b" " * 20 + b"\r\nzz\r\n"))  # too long, and broken, in one piece
        assert client("GET", "/healthz")[0] == 200
    assert caplog.text == ""


def test_small_answers_do_not_wait():
    """As curl and browsers see it: with Nagle's algorithm, an answer in two parts waits 40 ms for the first one's."""
    with serving(create_app(InstantPipe())) as client:
        sock = opened(client.port, HALF)
        until(lambda: len(client.server.connections) == 1)
        [connection] = client.server.connections._open
        theirs = connection.transport.get_extra_info("socket")
        assert theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        sock.close()


def test_no_thread_is_left():
    before = threading.active_count()
    with serving(create_app(InstantPipe())) as client:
        assert client.draw()[0] == 200
    until(lambda: threading.active_count() <= before)

"""sd/download.py against a local server that does everything wrong that servers do."""

import email.utils
import functools
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sd import download
from sd.download import DownloadError, Source, main

PROGRAM = Path(download.__file__)
CONTENT = bytes(range(256)) * 20_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves `content` at every path. `answers` are used up one a request; when there are none left it behaves."""

    def __init__(self):
        self.content = CONTENT
        self.etag = '"one"'
        self.answers: list[Callable[[BaseHTTPRequestHandler, Server], None]] = []
        self.requests: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(dict(self.headers))
                answer = outer.answers.pop(0) if outer.answers else serve
                answer(self, outer)

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *args):
                """Clients that hang up are part of the tests."""

        self.httpd = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/file.bin"
        threading.Thread(target=self.httpd.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()

    @property
    def ranges(self) -> list[str | None]:
        return [request.get("Range") for request in self.requests]


def serve(
    handler, server, body: Callable[[bytes], bytes] = lambda body: body, pause: Callable[[], object] = lambda: None
) -> None:
    """As a good server does, ETag and If-Range included; `body` may shorten what is sent."""
    begin = int(re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "bytes=0-"))[1])
    if handler.headers.get("If-Range", server.etag) != server.etag:
        begin = 0
    if begin >= len(server.content):
        handler.send_response(416)
        handler.send_header("Content-Range", f"bytes */{len(server.content)}")
        handler.end_headers()
        return
    handler.send_response(206 if begin else 200)
    rest = server.content[begin:]
    if begin:
        handler.send_header("Content-Range", f"bytes {begin}-{len(server.content) - 1}/{len(server.content)}")
    handler.send_header("Content-Length", str(len(rest)))
    handler.send_header("ETag", server.etag)
    handler.end_headers()
    sent = body(rest)
    for i in range(0, len(sent), 2**16):
        handler.wfile.write(sent[i : i + 2**16])
        handler.wfile.flush()
        pause()


def drop_after(count: int):
    return lambda handler, server: serve(handler, server, lambda body: body[:count])


def slowly(handler, server) -> None:
    serve(handler, server, pause=lambda: time.sleep(0.05))


def ignore_range(handler, server) -> None:
    del handler.headers["Range"]
    serve(handler, server)


def status(code: int, **headers: str):
    def answer(handler, server):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def page(handler, server) -> None:
    body = b"<!DOCTYPE html><html>Sign in</html>"
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def wrong_range(handler, server) -> None:
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes 0-{len(server.content) - 1}/{len(server.content)}")
    handler.end_headers()


def chunked(*chunks: bytes, end: bool = True):
    def answer(handler, server):
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for chunk in (*chunks, *([b""] if end else [])):
            handler.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        handler.close_connection = True

    return answer


def redirect(handler, server) -> None:
    handler.send_response(302)
    handler.send_header("Location", server.url + "?signed")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def fetch(server, tmp_path):
    """Call `download`, noting its pauses instead of making them."""

    def call(size: int | None = len(CONTENT), sha256: str = SHA256, **options) -> bool:
        source = Source(server.url, sha256, size)
        return download.download(source, tmp_path / "file.bin", pause=call.pauses.append, **options)

    call.pauses = []
    return call


def left(tmp_path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir())


def whole(tmp_path) -> bool:
    return left(tmp_path) == ["file.bin"] and (tmp_path / "file.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_whole_file(server, fetch, tmp_path, size, capfd):
    assert fetch(size)
    assert whole(tmp_path)
    assert server.ranges == [None]
    assert "100%" in capfd.readouterr().err


def test_what_is_there_is_checked_not_fetched(server, fetch, tmp_path):
    (tmp_path / "file.bin").write_bytes(CONTENT)
    assert fetch() is False
    assert server.requests == []


def test_another_file_in_its_place_stays(server, fetch, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"mine")
    with pytest.raises(DownloadError, match="is another file"):
        fetch()
    assert (tmp_path / "file.bin").read_bytes() == b"mine"
    assert server.requests == []


def test_two_dropped_connections(server, fetch, tmp_path):
    server.answers = [drop_after(100_000), drop_after(50_000)]
    assert fetch()
    assert whole(tmp_path)
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert [request.get("If-Range") for request in server.requests] == [None, '"one"', '"one"']
    assert fetch.pauses == [1, 1]


def test_more_drops_than_retries_as_long_as_something_comes(server, fetch, tmp_path):
    server.answers = [drop_after(1000)] * 10
    assert fetch(retries=2)
    assert whole(tmp_path)


def test_a_dropped_chunked_answer(server, fetch, tmp_path):
    server.answers = [chunked(CONTENT[:1000], end=False)]
    assert fetch(size=None)
    assert whole(tmp_path)


def test_a_chunked_answer_of_unknown_length(server, fetch, tmp_path):
    server.answers = [chunked(CONTENT[:1000], CONTENT[1000:])]
    assert fetch(size=None)
    assert whole(tmp_path)
    assert server.ranges == [None]


def test_a_part_of_an_earlier_run(server, fetch, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:777])
    assert fetch()
    assert whole(tmp_path)
    assert server.ranges == ["bytes=777-"]


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_complete_part_of_an_earlier_run(server, fetch, tmp_path, size):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert fetch(size)
    assert whole(tmp_path)
    assert len(server.requests) == (0 if size else 1)


@pytest.mark.parametrize("part", [b"x" * 777, CONTENT[:-1] + b"x", CONTENT + b"more"])
@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_wrong_part_of_an_earlier_run(server, fetch, tmp_path, part, size):
    (tmp_path / "file.bin.part").write_bytes(part)
    assert fetch(size)
    assert whole(tmp_path)


def test_a_server_that_ignores_range(server, fetch, tmp_path, capfd):
    server.answers = [drop_after(100_000), ignore_range]
    assert fetch()
    assert whole(tmp_path)
    assert "does not resume" in capfd.readouterr().err


def test_a_file_that_changes_on_the_server(server, fetch, tmp_path):
    def drop_and_change(handler, server):
        server.content, content = b"old" * 60_000, server.content
        serve(handler, server, lambda body: body[:90_000])
        server.content, server.etag = content, '"two"'

    server.answers = [drop_and_change]
    assert fetch(size=None)
    assert whole(tmp_path)
    assert len(server.requests) == 2


def test_a_weak_etag_is_not_sent(server, fetch, tmp_path):
    server.etag = 'W/"weak"'
    server.answers = [drop_after(1000)]
    assert fetch()
    assert "If-Range" not in server.requests[1]


def test_a_wrong_content_range(server, fetch, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:777])
    server.answers = [wrong_range]
    assert fetch()
    assert whole(tmp_path)


def test_a_redirect_keeps_the_range(server, fetch, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:777])
    server.answers = [redirect]
    assert fetch()
    assert server.ranges == ["bytes=777-"] * 2


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_errors_that_pass(server, fetch, tmp_path, code):
    server.answers = [status(code)] * 3
    assert fetch()
    assert whole(tmp_path)
    assert fetch.pauses == [1, 2, 4]


def test_retry_after(server, fetch, tmp_path):
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    server.answers = [
        status(503, Retry_After="7"),
        status(503, Retry_After=in_a_minute),
        status(503, Retry_After="soon"),
        status(503, Retry_After="99999"),
    ]
    assert fetch()
    assert fetch.pauses[0] == 7
    assert 55 < fetch.pauses[1] <= 60
    assert fetch.pauses[2:] == [4, download.LONGEST_PAUSE]


def test_errors_that_do_not_pass_in_time(server, fetch, tmp_path):
    server.answers = [drop_after(1000)] + [status(503)] * 99
    with pytest.raises(DownloadError, match=r"gave up after 4 failures in a row: .*503"):
        fetch(retries=3)
    assert fetch.pauses == [1, 2, 4]
    assert left(tmp_path) == ["file.bin.part"]
    server.answers.clear()
    assert fetch()
    assert server.ranges[-1] == "bytes=1000-"


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_errors_that_stay(server, fetch, tmp_path, code):
    server.answers = [status(code)]
    with pytest.raises(DownloadError, match=str(code)):
        fetch()
    assert fetch.pauses == []
    assert len(server.requests) == 1


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_wrong_bytes_once(server, fetch, tmp_path, size):
    server.answers = [page]
    assert fetch(size)
    assert whole(tmp_path)
    assert len(server.requests) == 2


@pytest.mark.parametrize("answer", [page, lambda h, s: serve(h, s, lambda body: b"x" * len(body))])
def test_wrong_bytes_twice(server, fetch, tmp_path, answer):
    server.answers = [answer] * 9
    with pytest.raises(DownloadError, match="does not hold the right file"):
        fetch()
    assert len(server.requests) == 2
    assert left(tmp_path) == []


def test_nobody_there(tmp_path):
    source = Source("http://127.0.0.1:9/file.bin", SHA256)
    pauses = []
    with pytest.raises(DownloadError, match="gave up"):
        download.download(source, tmp_path / "file.bin", retries=2, pause=pauses.append)
    assert pauses == [1, 2]


def test_a_server_that_falls_silent(server, fetch, tmp_path):
    def hang(handler, server):
        serve(handler, server, lambda body: body[:1000])
        time.sleep(0.6)

    server.answers = [hang]
    assert fetch(silence=0.2)
    assert whole(tmp_path)


def test_the_disk_is_looked_at_first(server, fetch, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=len(CONTENT) - 1))
    with pytest.raises(DownloadError, match=r"0\.01 GB free"):
        fetch()
    assert (tmp_path / "file.bin.part").stat().st_size == 0
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:10])
    assert fetch()


def test_two_at_once(server, fetch, tmp_path):
    go_on = threading.Event()
    server.answers = [lambda handler, server: serve(handler, server, pause=go_on.wait)]
    first = threading.Thread(target=fetch)
    first.start()
    while not server.requests:
        time.sleep(0.01)
    try:
        with pytest.raises(DownloadError, match="another download"):
            fetch()
    finally:
        go_on.set()
        first.join()
    assert whole(tmp_path)


# ---- as a person types it


def arguments(server, tmp_path) -> list[str]:
    return ["--url", server.url, "--sha256", SHA256, "--out", str(tmp_path)]


def test_command_line(server, tmp_path, capsys):
    assert main(arguments(server, tmp_path)) == 0
    assert "sha256 is right" in capsys.readouterr().out
    assert whole(tmp_path)
    assert main(arguments(server, tmp_path)) == 0
    assert "was there already" in capsys.readouterr().out
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "nowhere/x"], "there is no folder"),
        (["--format", "zip"], "invalid choice"),
        (["--sha256", "0" * 64], "give its --url too"),
        (["--url", "http://127.0.0.1:9/x", "--sha256", "abc"], "64 hexadecimal digits"),
        (["--url", "file:///etc/passwd"], "must begin with https"),
        (["--url", "http://127.0.0.1:9/", "--sha256", "0" * 64], "is a folder"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "DATA", tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert left(tmp_path) == []


def test_a_404_is_one_line(server, tmp_path, capsys):
    server.answers = [status(404)]
    assert main(arguments(server, tmp_path)) == 2
    assert "404" in capsys.readouterr().err.splitlines()[-1]


def test_a_mirror_must_hold_the_same_file(server, tmp_path, capsys):
    assert main(["--url", server.url, "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "not 4265146304" in capsys.readouterr().err
    assert left(tmp_path) == []


def start(server, tmp_path) -> subprocess.Popen:
    command = [sys.executable, str(PROGRAM), *arguments(server, tmp_path)]
    # Whatever runs the tests in the background may ignore Ctrl-C, and its children inherit that.
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd="/", stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
    part = tmp_path / "file.bin.part"
    while not (part.exists() and part.stat().st_size > 2**20):
        assert process.poll() is None
        time.sleep(0.005)
    return process


def test_killed_midway_and_run_again(server, tmp_path):
    server.answers = [slowly]
    process = start(server, tmp_path)
    process.kill()
    process.communicate()
    assert left(tmp_path) == ["file.bin.part"]
    have = (tmp_path / "file.bin.part").stat().st_size
    assert have < len(CONTENT)
    assert main(arguments(server, tmp_path)) == 0
    assert whole(tmp_path)
    assert server.ranges == [None, f"bytes={have}-"]


def test_interrupted(server, tmp_path):
    server.answers = [slowly]
    process = start(server, tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert left(tmp_path) == ["file.bin.part"]


def test_a_full_disk(server, small_disk):
    assert shutil.disk_usage(small_disk).free < len(CONTENT)
    assert main(arguments(server, small_disk)) == 2
    assert os.listdir(small_disk) == ["file.bin.part"]
    server.answers = [chunked(CONTENT)]  # a server that does not say how much is coming
    assert main(arguments(server, small_disk)) == 2


# ---- what goes on for ever, or elsewhere


def test_without_a_network_it_is_told_at_once(tmp_path):
    pauses = []
    with pytest.raises(DownloadError, match=r"nowhere\.invalid cannot be found \(.*\): is this machine online\?"):
        download.download(Source("http://nowhere.invalid/file.bin", SHA256), tmp_path / "file.bin", pause=pauses.append)
    assert pauses == []


def test_a_link_in_the_place_of_the_part_file(server, fetch, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "file.bin.part").symlink_to(victim)
    with pytest.raises(DownloadError, match=r"file\.bin\.part is a link, which is not followed"):
        fetch()
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("address", ["ftp://127.0.0.1/file", "file:///etc/hostname"])
def test_redirects_to_other_kinds_of_addresses(server, fetch, address):
    server.answers = [status(302, Location=address)]
    with pytest.raises(DownloadError, match=r"which is no http address|is not allowed"):
        fetch()


def test_a_trickle_counts_as_lost(server, fetch, monkeypatch):
    def trickle(handler, server):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(CONTENT)))
        handler.end_headers()
        for i in range(200):
            handler.wfile.write(CONTENT[i : i + 1])
            handler.wfile.flush()
            time.sleep(0.02)

    monkeypatch.setattr(download, "SLOWEST", (1024, 0.5))
    server.answers = [trickle]
    fetch()
    assert len(server.requests) == 2


def test_a_body_without_end_leaves_room(server, fetch, tmp_path, monkeypatch):
    def endless(handler, server):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(2**16))

    usage = shutil.disk_usage(tmp_path)
    free = iter([usage._replace(free=10**12)] * 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: next(free, usage._replace(free=download.KEPT_FREE - 1)))
    server.answers = [endless]
    with pytest.raises(DownloadError, match=r"the disk is all but full after .* bytes of a body without"):
        fetch(size=None)
    assert (tmp_path / "file.bin.part").stat().st_size == 0

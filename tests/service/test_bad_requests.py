"""Requests of every kind of nonsense: each gets one readable line, or its connection is closed, and the server goes on.

Orders are read without HTTP, over every parameter and any JSON; what is sent raw has any method, header and body.
"""

import base64
import io
import json
import logging
import socket
from collections.abc import Iterator

import pytest
from hypothesis import strategies as st
from PIL import Image

from sd.config import Config
from sd.edits import larger_size
from sd.pictures.parameters import PARAMETERS
from sd.pictures.plan import Plan
from sd.service import connections
from sd.service.access import BasicAuth, client_of
from sd.service.answers import answer_type
from sd.service.app import create_app
from sd.service.logs import access_line
from sd.service.orders import Limits, read_order
from sd.service.worker import FailedError
from tests.generated import VALUES, likely, some, tried
from tests.service.support import JSON, NDJSON, PNG, Client, InstantPipe, serving

LIMITS = Limits(max_steps=20, max_side=1024, max_num_images=3, max_prompt=100)


# ---- orders


def upload() -> str:
    data = io.BytesIO()
    Image.effect_noise((64, 48), 50).save(data, format="PNG")
    return base64.b64encode(data.getvalue()).decode()


UPLOAD = upload()


@st.composite
def requests(draw) -> dict[str, object]:
    names = draw(st.lists(st.sampled_from([*PARAMETERS, "preview", "\x1b" * 900]) | st.text(), max_size=6, unique=True))
    found = {name: draw(VALUES if name not in PARAMETERS else likely(name, UPLOAD) | VALUES) for name in names}
    return {"prompt": "x", **found} if draw(st.integers(0, 9)) else found


def checked_line(error: FailedError) -> None:
    message = str(error)
    assert error.status in (400, 422)
    assert message
    assert "Traceback" not in message
    assert len(message) < 700, "a client's text is not told back at length"
    assert "\x1b" not in message


def read(body: bytes) -> None:
    """An order within the limits, or one line."""
    try:
        order = read_order(body, LIMITS, Config())
    except FailedError as error:
        checked_line(error)
        return
    assert isinstance(order.jobs, Plan)
    for job in order.jobs:
        assert 1 <= job.steps <= LIMITS.max_steps
        assert len(job.prompt) <= LIMITS.max_prompt
        assert max(larger_size(job.height or 512, job.width or 512, job.hires or 1, 64)) <= LIMITS.max_side
    assert len(order.jobs) <= LIMITS.max_num_images
    assert 0 < order.size < 1e12


@some(300, 10_000)
def test_any_value_of_any_parameter(examples):
    tried(lambda values: read(json.dumps(values).encode()), examples, requests())


@pytest.mark.parametrize("name", [*PARAMETERS, "preview"])
def test_each_parameter_alone(name):
    tried(lambda value: read(json.dumps({"prompt": "x", name: value}).encode()), 25, VALUES)


@pytest.mark.full(memory=False)
@pytest.mark.parametrize("name", [*PARAMETERS, "preview"])
def test_each_parameter_alone_at_length(name):
    tried(lambda value: read(json.dumps({"prompt": "x", name: value}).encode()), 400, VALUES)


@some(100, 3000)
def test_any_bytes(examples):
    tried(read, examples, st.binary(max_size=200) | st.text(max_size=80).map(str.encode))


@pytest.mark.parametrize("name", [name for name, one in PARAMETERS.items() if hasattr(one.check, "low")])
@pytest.mark.parametrize("number", ["1e40", "-1e40", "1" + "0" * 400, "1e400", "NaN", "-Infinity"])
def test_numbers_of_any_size(name, number):
    body = json.dumps({"prompt": "x", "init_image": UPLOAD, "mask": UPLOAD, "hires": 2, name: "?"}).replace(
        '"?"', number
    )
    with pytest.raises(FailedError) as refused:
        read_order(body.encode(), LIMITS, Config())
    assert refused.value.status == 422
    assert str(refused.value).startswith(f"{name} must be ")


@pytest.mark.parametrize("value", [0, -5, 5000, 10**30, 1e40])
def test_the_limit_that_is_told_is_this_servers(value):
    for name, one in PARAMETERS.items():
        most = LIMITS.of(name)
        if most is None or not hasattr(one.check, "low"):
            continue
        with pytest.raises(FailedError, match=rf"^{name} must be (from \d+ to|at most) {most}\b"):
            read_order(json.dumps({"prompt": "x", name: value}).encode(), LIMITS, Config())


@some(200, 4000)
def test_a_damaged_picture(examples):
    whole = base64.b64decode(UPLOAD)

    def decoded(places: list[tuple[int, int]], length: int) -> None:
        data = bytearray(whole)
        for place, byte in places:
            data[place % len(data)] = byte
        body = json.dumps({"prompt": "x", "init_image": base64.b64encode(data[:length]).decode()}).encode()
        try:
            [found] = read_order(body, LIMITS, Config()).uploads
            found.decode()
        except FailedError as error:
            checked_line(error)

    places = st.lists(st.tuples(st.integers(0, 400) | st.integers(0, 10**5), st.integers(0, 255)), max_size=6)
    tried(decoded, examples, places, st.sampled_from([len(whole)] * 3 + [0, 8, 33, 100, len(whole) - 20]))


# ---- headers


@some(200, 3000)
def test_any_header_of_those_that_are_read(examples):
    auth = BasicAuth("a", "b")

    def look(text: str) -> None:
        assert answer_type(text, 2) in (PNG, JSON, NDJSON)
        assert auth.accepts(text) is False
        assert len(client_of(text)) <= 64
        line = access_line(text, text, text, 200, 0.1, 1)
        assert line.isprintable()
        assert len(line) < 200

    tried(look, examples, st.text(max_size=200) | st.text("Basic :=,;/*q01[]. \x1b", max_size=60))


NAMES = [
    *("Host", "Content-Type", "Content-Length", "Transfer-Encoding", "Accept", "Authorization", "Connection", "Expect"),
    *("Upgrade", "X-Forwarded-For", "X-Forwarded-Proto", "Cookie", "Range", "Origin", "TE", "Trailer"),
]
HEADER_VALUES = st.one_of(
    st.binary(max_size=30),
    st.sampled_from(
        [
            *(b"", b"x", b"localhost", b"a:b:c", b"0", b"7", b"-1", b"1e9", b"9" * 30, b"chunked", b"gzip, chunked"),
            *(b"close", b"keep-alive, Upgrade", b"websocket", b"100-continue", b"application/json", b"image/png"),
            *(b"application/x-ndjson", b"Basic YTpi", b"Basic %", b"*/*;q=x", b"bytes=0-", b"h2c", b"\xff\xfe"),
        ]
    ),
)
METHODS = st.sampled_from([b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT", b"CONNECT", b"TRACE", b"PRI"]) | st.binary(
    max_size=8
)
PATHS = st.sampled_from(
    [
        b"/",
        b"/healthz",
        b"/generate",
        b"/metrics",
        b"*",
        b"//",
        b"/../etc",
        b"/%00",
        b"/%ff?x",
        b"http://x/",
        b"x:1",
        b"/\xff",
    ]
) | st.binary(max_size=12)
VERSIONS = st.sampled_from([b"HTTP/1.1"] * 4 + [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b""])
BODIES = st.sampled_from(
    [b"", b'{"prompt": "x", "steps": 1}', b"{", b'5\r\n{"a":\r\n', b"zz\r\n", b"0\r\n\r\n", b"ffffffffffffffff\r\nx"]
) | st.binary(max_size=40)


@st.composite
def messages(draw) -> bytes:
    """Mostly HTTP."""
    headers = draw(st.lists(st.tuples(st.sampled_from(NAMES), HEADER_VALUES), max_size=6))
    if draw(st.integers(0, 4)):
        headers = [("Host", b"localhost"), ("Content-Type", b"application/json"), *headers]
    head = b" ".join([draw(METHODS), draw(PATHS), draw(VERSIONS)]) + b"\r\n"
    head += b"".join(name.encode() + b": " + value + b"\r\n" for name, value in headers)
    body = draw(BODIES)
    if draw(st.integers(0, 2)):
        head += b"Content-Length: %d\r\n" % len(body)
    return head + draw(st.sampled_from([b"\r\n"] * 5 + [b""])) + body


@pytest.fixture(scope="module")
def server() -> Iterator[Client]:
    """One with short deadlines: many messages are no whole request."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "HEAD_SECONDS", 0.2)
        with serving(create_app(InstantPipe(), LIMITS)) as client:
            yield client


def answer_to(port: int, sent: bytes) -> bytes:
    """All that comes back until the server closes, or once the client has said its last."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as sock:
        data = b""
        try:
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
            while more := sock.recv(2**16):
                data += more
        except (ConnectionResetError, BrokenPipeError):
            pass
        return data


@some(150, 3000)
def test_any_message(server, caplog, examples):
    caplog.set_level(logging.ERROR)

    def send(sent: bytes) -> None:
        data = answer_to(server.port, sent)
        assert data == b"" or data.startswith(b"HTTP/1.1 "), data
        assert b"Traceback" not in data

    tried(send, examples, messages())
    assert [record.getMessage() for record in caplog.records] == []
    status, _, png = server.draw()
    assert status == 200
    with Image.open(io.BytesIO(png)) as image:
        assert image.size == (8, 8)

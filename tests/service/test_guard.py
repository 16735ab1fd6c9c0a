"""Who is let in, what is written down of a request, and what HTTP has beside GET and POST."""

import base64
import json
import logging
import re
import time
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sd.service import logs
from sd.service.access import BasicAuth, Lockout, client_of
from sd.service.app import create_app
from sd.service.logs import AtMost, access_line, fault
from sd.service.orders import Limits
from tests.service.support import JSON, NDJSON, PNG, Client, InstantPipe, WaitingPipe, serving
from tests.weights import shallow_pipeline

LONG = "a fox " * 60 + "with a very private tail"


def password(text: str) -> str:
    return f"Basic {base64.b64encode(text.encode()).decode()}"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# ---- wrong passwords


def test_each_wrong_one_is_answered_later_and_some_lock_out():
    clock = Clock()
    lockout = Lockout(clock)
    delays = [lockout.wrong("a") for _ in range(Lockout.FREE)]
    assert delays == sorted(delays)
    assert delays[0] < delays[3] <= delays[-1] == Lockout.LONGEST_DELAY
    assert (lockout.seconds_left("a"), lockout.seconds_left("b")) == (30, 0)
    clock.now += 30
    assert lockout.seconds_left("a") == 0
    lockout.wrong("a")
    assert lockout.seconds_left("a") == 60
    for _ in range(1000):
        lockout.wrong("a")
    assert lockout.seconds_left("a") == Lockout.LONGEST_LOCK


def test_who_has_no_address_is_not_locked_out_for_all_others():
    lockout = Lockout()
    delays = [lockout.wrong("") for _ in range(50)]
    assert (lockout.seconds_left(""), delays[-1]) == (0, Lockout.LONGEST_DELAY)


def test_the_right_one_and_time_forgive():
    clock = Clock()
    lockout = Lockout(clock)
    for _ in range(Lockout.FREE - 1):
        lockout.wrong("a")
    lockout.right("a")
    assert lockout.wrong("a") == Lockout.FIRST_DELAY
    for _ in range(Lockout.FREE):
        lockout.wrong("b")
    clock.now += Lockout.FORGOTTEN + 1
    assert lockout.wrong("b") == Lockout.FIRST_DELAY


def test_clients_that_are_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr(Lockout, "REMEMBERED", 3)
    lockout = Lockout()
    for client in "abcda":
        lockout.wrong(client)
    assert set(lockout._wrong) == {"c", "d", "a"}


def test_clients():
    assert client_of("10.0.0.1") == client_of("::ffff:10.0.0.1") == "10.0.0.1"
    assert client_of("2001:db8::1") == client_of("2001:db8::ffff%eth0") != client_of("2001:db8:0:1::1")
    assert len(client_of("x" * 1000)) == 64


def test_a_lockout_over_http_is_by_client(monkeypatch):
    monkeypatch.setattr(Lockout, "FIRST_DELAY", 0.0)
    with serving(create_app(InstantPipe(), auth=BasicAuth("a", "b")), proxies=["127.0.0.1"]) as client:

        def status(given: str | None, address: str) -> int:
            sent = {} if given is None else {"authorization": password(given)}
            return client("GET", "/healthz", x_forwarded_for=address, **sent)[0]

        assert [status("a:no", "10.0.0.1") for _ in range(Lockout.FREE)] == [401] * Lockout.FREE
        code, headers, body = client("GET", "/healthz", authorization=password("a:b"), x_forwarded_for="10.0.0.1")
        assert (code, int(headers["retry-after"]) in range(28, 31)) == (429, True)
        assert "too many wrong passwords" in json.loads(body)["error"]
        assert status("a:b", "10.0.0.2") == 200
        assert [status(None, "10.0.0.3") for _ in range(20)] == [401] * 20
        assert status("a:b", "10.0.0.3") == 200, "who has not guessed is not locked out"


@pytest.mark.parametrize("proxies", [[], ["10.9.9.9"]])
def test_nobody_names_a_client_but_the_proxy(monkeypatch, proxies):
    monkeypatch.setattr(Lockout, "FIRST_DELAY", 0.0)
    with serving(create_app(InstantPipe(), auth=BasicAuth("a", "b")), proxies=proxies) as client:
        sent = [{"authorization": password("a:no"), "x_forwarded_for": f"10.0.0.{number}"} for number in range(11)]
        assert [client("GET", "/healthz", **one)[0] for one in sent] == [401] * 10 + [429]


def test_a_wrong_password_is_answered_late(monkeypatch):
    monkeypatch.setattr(Lockout, "FIRST_DELAY", 0.5)
    with serving(create_app(InstantPipe(), auth=BasicAuth("a", "b"))) as client:
        start = time.monotonic()
        assert client("GET", "/healthz", authorization=password("a:no"))[0] == 401
        assert time.monotonic() - start >= 0.5


# ---- methods


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving(create_app(InstantPipe())) as client:
        yield client


@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics"])
def test_head_is_get_without_a_body(client, path):
    status, headers, body = client("HEAD", path)
    assert (status, body) == (200, b"")
    got = client("GET", path)[1]
    assert set(headers) == set(got)
    assert headers["content-type"] == got["content-type"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/", "GET, HEAD, OPTIONS"), ("/healthz", "GET, HEAD, OPTIONS"), ("/generate", "POST, OPTIONS")],
)
def test_options_and_what_is_not_allowed(client, path, allowed):
    status, headers, body = client("OPTIONS", path)
    assert (status, headers["allow"], body) == (204, allowed, b"")
    for method in {"GET", "HEAD", "POST", "PUT", "DELETE", "TRACE", "BREW"} - set(allowed.split(", ")):
        status, headers, _ = client(method, path)
        assert (status, headers["allow"]) == (405, allowed)
    assert client("OPTIONS", "/nothing")[0] == 404


# ---- numbers


def samples(text: bytes) -> dict[str, float]:
    return {
        sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_metrics_are_behind_the_password():
    with serving(create_app(InstantPipe(), auth=BasicAuth("a", "b"))) as client:
        assert client("GET", "/metrics")[0] == 401
        status, headers, body = client("GET", "/metrics", authorization=password("a:b"))
        assert (status, headers["content-type"].startswith("text/plain")) == (200, True)
        assert samples(body)["sd_requests_total /metrics 401"] == 1


def test_metrics_count():
    with serving(create_app(InstantPipe())) as client:
        assert client.draw(JSON, num_images=3)[0] == 200
        assert client.draw(steps=0)[0] == 422
        for path in ("/a", "/b"):
            client("GET", path)
        found = samples(client("GET", "/metrics")[2])
    assert found["sd_pictures_total"] == 3
    assert (found["sd_stage_seconds_total text"], found["sd_stage_seconds_total denoise"]) == (0.75, 1.5)
    assert (found["sd_requests_total /generate 200"], found["sd_requests_total /generate 422"]) == (1, 1)
    assert found["sd_requests_total other 404"] == 2, "no new series for each address that somebody tries"
    assert found["sd_request_seconds_count /generate"] == 2
    assert (found["sd_queue_waiting"], found["sd_drawing"]) == (0, 0)
    assert found["process_resident_memory_bytes"] > 1e6


def test_metrics_tell_of_the_queue():
    pipe = WaitingPipe()
    request = ("POST", "/generate", {"prompt": "x"})
    with serving(create_app(pipe)) as client, client.open(*request, accept=NDJSON) as one:
        pipe.began.get(timeout=120)
        with client.open(*request, accept=NDJSON) as two:
            found = samples(client("GET", "/metrics")[2])
            assert (found["sd_queue_waiting"], found["sd_drawing"]) == (1, 1)
            pipe.finish.release(2)
            one.read(), two.read()


# ---- the log


LINE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z 127\.0\.0\.1 POST /generate 200 \d+\.\d{3}s queue 0"


def access_lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "sd.service.access"]


def test_a_line_a_request(caplog):
    caplog.set_level(logging.INFO)
    with serving(create_app(InstantPipe())) as client:
        client.draw()
        client("GET", "/healthz?secret=1")
    first, second = access_lines(caplog)
    assert re.fullmatch(LINE, first)
    assert "GET /healthz 200 " in second


def test_a_line_holds_nothing_that_a_terminal_obeys():
    line = access_line("::1", "GET\x1b[2J", "/\x1b]0;x\x07 é\n" + "x" * 500, 404, 0.5, 3)
    assert re.fullmatch(r"\S+ ::1 GET\?\[2J /\?\]0;x\?\?\?\?x+\.\.\. 404 0\.500s queue 3", line)
    assert len(line) < 160


def test_a_stream_that_is_left_is_a_line_and_no_traceback(caplog):
    caplog.set_level(logging.INFO)
    pipe = WaitingPipe()
    with serving(create_app(pipe)) as client:
        for accept in (PNG, NDJSON):
            with client.open("POST", "/generate", {"prompt": "x"}, accept=NDJSON) as response:
                response.readline()
            assert pipe.left.get(timeout=120) == "x"
            assert accept
    assert "Traceback" not in caplog.text
    assert len(access_lines(caplog)) == 2


def shown(caplog, log_prompts: bool, **values: object) -> str:
    """The log of drawing a long prompt."""
    caplog.set_level(logging.INFO)
    with serving(create_app(shallow_pipeline(), Limits(), log_prompts=log_prompts)) as client:
        assert client.draw(prompt=LONG, **values)[0] == 200
    return caplog.text


@pytest.mark.parametrize("syntax", ["plain", "weights"])
def test_the_log_holds_no_prompt_unless_asked(caplog, syntax):
    assert "private" not in shown(caplog, False, prompt_syntax=syntax)
    caplog.clear()
    assert "private" in shown(caplog, True, prompt_syntax=syntax)


def test_a_fault_keeps_the_prompt_to_itself(caplog):
    error = ValueError(f"cannot draw {LONG}")
    assert "private" not in fault(error, with_prompts=False)
    assert "ValueError" in fault(error, with_prompts=False)
    assert "private" in fault(error, with_prompts=True)
    assert "no kernel image" in fault(RuntimeError("no kernel image"), with_prompts=False)


def test_a_log_that_somebody_fills():
    clock = Clock()
    limit = AtMost(3, 10, clock)
    records = [logging.LogRecord("x", logging.INFO, "", 0, "line %d", (number,), None) for number in range(8)]
    assert [limit.filter(record) for record in records] == [True] * 3 + [False] * 5
    clock.now += 10
    again = logging.LogRecord("x", logging.INFO, "", 0, "line %d", (9,), None)
    assert limit.filter(again)
    assert again.getMessage() == "(5 lines left out)\nline 9"
    assert logs.AtMost().records >= 100


# ---- what of a prompt is not read


def test_what_is_cut_is_told():
    with serving(create_app(shallow_pipeline())) as client:
        given = {"prompt": LONG, "negative_prompt": LONG.replace("private", "bad"), "prompt_syntax": "plain"}
        _, headers, _ = client.draw(**given)
        [negative, positive] = json.loads(headers["x-cut"])
        assert positive.endswith("with a very private tail")
        assert negative.endswith("with a very bad tail")
        pictures = json.loads(client.draw(JSON, num_images=2, **given)[2])["pictures"]
        assert [one["cut"] for one in pictures] == [[negative, positive]] * 2
        lines = [json.loads(line) for line in client.draw(NDJSON, **given)[2].splitlines()]
        assert [line["cut"] for line in lines if line["event"] == "picture"] == [[negative, positive]]
        assert "x-cut" not in client.draw(prompt=LONG)[1], "it is read in chunks"
        assert "x-cut" not in client.draw(prompt="a fox", prompt_syntax="plain")[1]


def test_a_header_holds_what_is_cut_of_any_script():
    with serving(create_app(shallow_pipeline())) as client:
        status, headers, _ = client.draw(prompt="狐狸 " * 600, prompt_syntax="plain")
        [cut] = json.loads(headers["x-cut"])
        assert (status, "狐" in cut, len(cut) <= 1000) == (200, True, True)

"""What the service writes into its log: a line a request, never a prompt unless asked, never more than can be read."""

import logging
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime


def access_line(client: str, method: str, path: str, status: int, seconds: float, queue: int) -> str:
    """One request: time, client, method and path, status, seconds, how many wait. All printable, nothing else."""
    when = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    what = f"{_plain(method, 10)} {_plain(path, 60)}"
    return f"{when} {_plain(client, 45) or '-'} {what} {status} {seconds:.3f}s queue {queue}"


def _plain(text: str, most: int) -> str:
    """In ASCII, without spaces or anything that a terminal would obey."""
    plain = "".join(c if "!" <= c <= "~" else "?" for c in text)
    return plain if len(plain) <= most else plain[: most - 3] + "..."


def fault(error: BaseException, with_prompts: bool) -> str:
    """A traceback. Errors of a value may quote the prompt: they keep their words to themselves unless asked."""
    if with_prompts:
        return "".join(traceback.format_exception(error)).rstrip()
    frames = "".join(traceback.format_tb(error.__traceback__))
    said = (
        type(error).__name__
        if isinstance(error, ValueError | LookupError | TypeError)
        else f"{type(error).__name__}: {error}"
    )
    return f"Traceback (most recent call last):\n{frames}{said}"


class AtMost(logging.Filter):
    """Of a handler: so many records in so many seconds, and a line for how many there were beside them."""

    def __init__(self, records: int = 200, seconds: float = 10.0, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self.records = records
        self.seconds = seconds
        self.left_out = 0
        self._clock = clock
        self._start = clock()
        self._count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._clock()
        if now - self._start >= self.seconds:
            if self.left_out:
                record.msg = f"({self.left_out} lines left out)\n{record.getMessage()}"
                record.args = ()
            self._start, self._count, self.left_out = now, 0, 0
        self._count += 1
        if self._count <= self.records:
            return True
        self.left_out += 1
        return False

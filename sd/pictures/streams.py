"""Standard output and errors that never cost a picture: closed ones, readers that leave, names that do not print."""

import io
import os
import sys
from typing import TextIO


class Steady(io.TextIOBase):
    """A text stream over another one, where writing never fails: after the first failure nothing is written."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.broken = False

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def isatty(self) -> bool:
        return not self.broken and self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def buffer(self) -> io.BufferedIOBase:
        """For bytes, which do fail."""
        return self.stream.buffer

    @property
    def encoding(self) -> str:
        return self.stream.encoding

    def _try(self, action) -> None:
        if self.broken:
            return
        try:
            action()
        except (OSError, ValueError):
            self.broken = True
            _to_nowhere(self.stream)


def _to_nowhere(stream: TextIO) -> None:
    """What its buffer still holds must not fail when Python ends."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass


def steady() -> None:
    """Make this process's standard output and errors such streams. Closed ones are opened, to nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Steady(stream))

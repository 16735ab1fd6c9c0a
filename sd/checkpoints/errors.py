"""What is wrong with a checkpoint, in one line: whatever the file holds, and however reading it failed."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

StrPath = str | os.PathLike


class CheckpointError(ValueError):
    """What is wrong with which checkpoint and what to do about it, in one line."""


@contextmanager
def naming(path: StrPath) -> Iterator[None]:
    """Begin the checkpoint errors of the body with the path."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(_one_line(f"{os.fspath(path)}: {error}")) from error.__cause__


@contextmanager
def damaged(what: str) -> Iterator[None]:
    """Turn whatever the body raises into a checkpoint error: damaged files fail in too many ways to list them."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what} ({_short(error)})") from error


def _short(error: Exception) -> str:
    """The end of torch's message holds the reason; its beginning advises to unpickle without protection."""
    text = str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__
    return text.splitlines()[0][:160]


def _one_line(text: str) -> str:
    """Names in messages come from the file: no line breaks, no terminal codes, no megabytes."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text.split())[:600]


def some(names: Iterable[str], shown: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(name[:100] for name in names[:shown]) + more

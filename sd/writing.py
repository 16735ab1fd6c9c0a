"""Files that are there whole or not at all: the one way in which this program writes them. Needs no torch."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike, at_end: bool = True) -> Iterator[Path]:
    """A temporary name beside path to write to; when the body succeeds it is synced and, at_end, renamed to path.

    An error or Ctrl-C in the body leaves what was at path as it is and nothing beside it. Raises OSError.
    """
    path = Path(path)
    part = path.with_name(f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        part.touch()
        permissions = part.stat().st_mode
        yield part
        part.chmod(permissions)  # libraries may make files that only their owner can read
        with part.open("rb") as file:
            os.fsync(file.fileno())
        if at_end:
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Write data to path by `written_whole`."""
    with written_whole(path) as part:
        part.write_bytes(data)


def write_new(path: str | os.PathLike, data: bytes) -> Path:
    """The same, but never in the place of a file that is there: then to path with another number before its ending.

    Returns the path that it became.
    """
    path, number = Path(path), 0
    stem = re.sub(r"-\d+$", "", path.stem)
    with written_whole(path, at_end=False) as part:
        part.write_bytes(data)
        target = path
        while not _linked(part, target):
            number += 1
            target = path.with_name(f"{stem}-{number}{path.suffix}")
    return target


def _linked(part: Path, target: Path) -> bool:
    """Give part another name, unless there is such a file."""
    try:
        os.link(part, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if os.path.lexists(target):
            return False
        os.rename(part, target)
        part.touch()
    return True

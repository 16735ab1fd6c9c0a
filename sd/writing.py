"""Files that are there whole or not at all: the one way in which this program writes them. Needs no torch."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside path to write to; when the body succeeds it is synced and renamed to path.

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
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Write data to path by `written_whole`."""
    with written_whole(path) as part:
        part.write_bytes(data)

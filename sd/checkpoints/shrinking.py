"""A mapped file that becomes shorter, or whose disk goes away: Linux answers the next touch of it with SIGBUS, and
without more that ends the process without a word.

Nothing can be computed any more then, but something can be said. The signal comes from the very instruction that
touched the page, a product's or a copy's, and not from within Python or an allocator: so a Python function may run
there, which elsewhere no handler of a signal may do. It must not return, since the instruction would be tried again.
"""

import ctypes
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from sd.checkpoints.mapped import mapped_files

_kept: list[object] = []
"""What C calls must stay."""


def on_bus_error(action: Callable[[str], NoReturn]) -> None:
    """Call action(message), with one line about it, in the thread that touched such a file. Nothing outside of Linux.

    For programs, not for libraries: it is the process's only one.
    """
    if not hasattr(signal, "SIGBUS") or not Path("/proc/self/maps").exists():
        return
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: action(_message()))
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    _kept.append(handler)
    libc.signal(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))


def _message() -> str:
    shorter = ", ".join(dict.fromkeys(str(path) for path in shrunk_files()))
    what = f"{shorter} became shorter" if shorter else "a file of weights could no longer be read"
    return f"{what} while it was in use (written to, by a sync client? a network disk?); keep it on a local disk"


def shrunk_files() -> list[Path]:
    """Mapped files that end before what is mapped of them."""
    found = []
    for file in mapped_files():
        try:
            there = file.path.stat().st_size
        except OSError:  # deleted ones stay as they are for who has them mapped
            continue
        if there < file.last - file.first + file.offset - _PAGE:
            found.append(file.path)
    return found


_PAGE = 1 << 16  # of any architecture; mappings end at a page, and their files do not

"""Weights that are mapped from a file: which they are, and giving their pages back to the system."""

import ctypes
import mmap
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

MADV_PAGEOUT = 21  # Python 3.11's mmap does not name it
LARGE_FILE = 1 << 20  # bytes; libraries are mapped in hundreds of smaller pieces


def mapped(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those whose memory is a file's, as that of weights is which are on disk in the dtype that they are used in."""
    files = mapped_files()
    return [tensor for tensor in tensors if any(file.first <= tensor.data_ptr() < file.last for file in files)]


@dataclass(frozen=True)
class MappedFile:
    """Addresses first to last of this process are those of a file, from an offset on. inode: which file."""

    first: int
    last: int
    offset: int
    inode: int
    path: Path


def mapped_files() -> list[MappedFile]:
    """The large ones. Nothing where the system does not list them."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    fields = [line.split(maxsplit=5) for line in lines]
    found = [_of_line(*f) for f in fields if len(f) == 6 and f[5].startswith("/") and f[1][0] == "r"]
    return [file for file in found if file.last - file.first >= LARGE_FILE]


def _of_line(addresses: str, mode: str, offset: str, device: str, inode: str, path: str) -> MappedFile:
    first, last = (int(bound, 16) for bound in addresses.split("-"))
    return MappedFile(first, last, int(offset, 16), int(inode), Path(path))


def into_memory(tensors: Iterable[Tensor]) -> None:
    """Copy those that are mapped, so that the file may go: they stay the same parameters, with the same values.

    A pipeline of them is told by `note_loaded` that these are as its file has them, elsewhere though they lie.
    """
    for tensor in mapped(tensors):
        tensor.data = tensor.data.clone()


def page_out(tensor: Tensor) -> None:
    """Tell Linux that a mapped tensor is not needed for a while: it stops to count as this process's memory.

    Nothing is lost. Pages as the file has them stay in the system's cache until somebody needs the room, so that the
    next touch mostly finds them there; where any was changed, all are written out, changed ones to swap.
    """
    first, last = _whole_pages(tensor.data_ptr(), tensor.nbytes)
    if sys.platform == "linux" and last > first:
        _advise(first, last, mmap.MADV_DONTNEED if _as_the_file(first, last) else MADV_PAGEOUT)


def drop_pages(tensor: Tensor) -> None:
    """`page_out` for a mapped tensor that nobody has changed, with all of its storage; changes would be lost.

    They are read again from the file if anything touches them. Only for file mappings: it would clear other memory.
    """
    storage = tensor.untyped_storage()
    first, last = _whole_pages(storage.data_ptr(), storage.nbytes())
    if sys.platform == "linux" and last > first:
        _advise(first, last, mmap.MADV_DONTNEED)


def _whole_pages(address: int, size: int) -> tuple[int, int]:
    """The pages that lie in these bytes as a whole: from, to."""
    return -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE


def _advise(first: int, last: int, advice: int) -> None:
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


PRESENT, SWAPPED, OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))  # in Linux's pagemap


def _as_the_file(first: int, last: int) -> bool:
    """Whether all pages of these addresses are still those of a file; a changed one is the process's own."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(first // mmap.PAGESIZE * 8)
            pages = np.frombuffer(file.read((last - first) // mmap.PAGESIZE * 8), np.uint64)
    except OSError:
        return False
    whole = len(pages) == (last - first) // mmap.PAGESIZE
    own = (pages & SWAPPED != 0) | ((pages & PRESENT != 0) & (pages & OF_FILE == 0))
    return whole and not own.any()

"""How much memory there is, how many pictures fit into it at once, and whether an error says that they did not."""

import ctypes
import gc
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sd.config import Config

MOST_AT_ONCE = {"cpu": 4}
"""Pictures in a batch beyond which nothing is gained but latency: a CPU is busy with one already."""

MOST_ON_ACCELERATOR = 16
LIVE_MAPS = 8
SHARE = 0.8


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch's CPU allocator and some backends raise a plain RuntimeError; oneDNN's names no reason at all."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    texts = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "could not create a primitive")
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)


def release(device: torch.device) -> None:
    """Give back what a failed batch left behind."""
    gc.collect()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def available(device: torch.device) -> int | None:
    """Bytes that new tensors on the device can take, or None where it cannot be told."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _available_ram()


def _available_ram() -> int | None:
    """The kernel's estimate, or what a container's limit leaves, whichever is less."""
    try:
        meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(meminfo["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return min([free, *_left_by_cgroup()])


def _left_by_cgroup() -> list[int]:
    pairs = [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")]
    left = []
    for limit, usage in pairs:
        try:
            limit_bytes, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in (limit, usage))
        except (OSError, ValueError):  # not there, or "max"
            continue
        left.append(max(0, limit_bytes - used))
    return left


def picture_bytes(config: Config, height: int, width: int, dtype: torch.dtype) -> int:
    """About what drawing one picture takes beside the weights, height and width in pixels.

    The peak is in the VAE's decoder, where maps of 2 * ch channels at full resolution meet: LIVE_MAPS of them count
    the convolution's work space too.
    """
    return LIVE_MAPS * 2 * config.vae.ch * height * width * dtype.itemsize


def pictures_at_once(config: Config, height: int, width: int, dtype: torch.dtype, device: torch.device) -> int:
    """The batch to try first: as many as should fit into SHARE of the memory, at least 1."""
    most = MOST_AT_ONCE.get(device.type, MOST_ON_ACCELERATOR)
    if (free := available(device)) is None:
        return most
    fit = int(free * SHARE) // picture_bytes(config, height, width, dtype)
    return max(1, min(most, fit))


# ---- weights that are mapped from a file

MADV_PAGEOUT = 21  # Python 3.11's mmap does not name it
LARGE_FILE = 1 << 20  # bytes; libraries are mapped in hundreds of smaller pieces


def mapped(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those whose memory is a file's, as that of weights is which are on disk in the dtype that they are used in."""
    ranges = _mapped_files()
    return [tensor for tensor in tensors if any(first <= tensor.data_ptr() < last for first, last in ranges)]


def _mapped_files() -> list[tuple[int, int]]:
    """Addresses of this process that belong to large files: from, to."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    fields = [line.split(maxsplit=5) for line in lines]
    bounds = [[int(bound, 16) for bound in f[0].split("-")] for f in fields if len(f) == 6 and f[5].startswith("/")]
    return [(first, last) for first, last in bounds if last - first >= LARGE_FILE]


def page_out(tensor: Tensor) -> None:
    """Tell Linux that a mapped tensor is not needed for a while: it stops to count as this process's memory.

    Nothing is lost. Pages as the file has them stay in the system's cache until somebody needs the room, so that the
    next touch mostly finds them there; where any was changed, all are written out, changed ones to swap.
    """
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and last > first:
        advice = mmap.MADV_DONTNEED if _as_the_file(first, last) else MADV_PAGEOUT
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

"""How much memory there is, how many pictures fit into it at once, and whether an error says that they did not."""

import gc
from pathlib import Path

import torch

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

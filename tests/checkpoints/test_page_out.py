"""Weights that go back to the file that they are mapped from."""

import ctypes
import mmap
import os

import torch
from torch import Tensor

from bench.load import resident
from bench.reference.numbers import noise
from sd.checkpoints.mapped import mapped, page_out


def test_page_out_loses_nothing(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(noise(1 << 20).numpy().tobytes())
    from_file = torch.from_file(str(path), shared=False, size=1 << 20)
    own = from_file.clone()
    assert mapped([own, from_file]) == [from_file]
    for tensor in (from_file, own, own[5:9]):
        page_out(tensor)
    assert torch.equal(from_file, own)
    own[4321] = from_file[4321] = 7
    page_out(from_file)
    assert torch.equal(from_file, own)


def test_paged_out_weights_leave_the_process(tmp_path):
    path, size = tmp_path / "zeros", 64 << 20
    with path.open("wb") as file:
        file.write(bytes(size))
        os.fsync(file.fileno())  # the system drops only pages that are on the disk
    from_file = torch.from_file(str(path), shared=False, size=size // 4)
    assert from_file.sum() == 0
    before = resident()["VmRSS"]
    page_out(from_file)
    assert resident()["VmRSS"] < before - 0.9 * size
    assert in_the_systems_cache(from_file)


def in_the_systems_cache(tensor: Tensor) -> bool:
    """Whether all pages of a mapped tensor would be found without reading the file."""
    found = (ctypes.c_ubyte * (tensor.nbytes // mmap.PAGESIZE))()
    result = ctypes.CDLL(None).mincore(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), found)
    return result == 0 and all(page & 1 for page in found)

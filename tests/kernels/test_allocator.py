"""Freed memory kept by the process, counted in pages that the system must clear."""

import subprocess
import sys
from pathlib import Path

import pytest

from sd.kernels import allocator

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.skipif(not allocator.supported(), reason="needs glibc")
def test_kept_memory_is_not_fetched_page_by_page_again():
    """In a process of its own: other tests leave memory behind that would be used again anyway."""
    program = """
import resource, torch
from sd.kernels.allocator import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (64, 48, 64, 96) * 4:
        x = torch.ones(megabytes << 18)  # the one before is freed once this is made
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = faults()
with freed_memory_kept():
    faults()
    within = faults()
print(outside, within, faults())
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})
    outside, within, after = map(int, result.stdout.split())
    assert within < min(outside, after) / 4

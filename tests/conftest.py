"""Full-size tests are skipped, with the reason, where the machine is too small for them."""

import os

import pytest

FULL_SIZE_MEMORY = 16 * 2**30


def memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if memory() >= FULL_SIZE_MEMORY:
        return
    reason = f"full size needs {FULL_SIZE_MEMORY >> 30} GiB of memory; here are {memory() / 2**30:.1f}"
    for item in items:
        if "full" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))

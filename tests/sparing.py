"""Which cases of a long list `make test` runs; `make test-full` runs all the others."""

from collections.abc import Callable, Iterable

import pytest

FULL = pytest.mark.full(memory=False)


def sparing(cases: Iterable, now: Callable[[object], bool]) -> list:
    """The cases, those for which now(case) is false being left to `make test-full`."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*v, marks=() if now(v if len(v) > 1 else v[0]) else FULL) for v in values]

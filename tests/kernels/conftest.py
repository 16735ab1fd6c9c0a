"""The C++ kernels in each instruction set that this machine has."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest

from sd.kernels import native
from tests.sparing import sparing

EMULATED = "amx, emulated"
FIRST = (native.sets()[-1], EMULATED)  # each set costs a compilation


@pytest.fixture(scope="module", params=sparing([*native.sets(), EMULATED], lambda name: name in FIRST))
def every_set(request) -> Iterator[str]:
    """The kernels are those of one set, by its name; a test runs once for each. AMX also in plain C++.

    `make test` runs the largest that the machine has and the emulated tiles, `make test-full` the others.
    """
    if not native.compiler():
        pytest.skip("there is no C++ compiler")
    variables = {"SD_CPU_ISA": request.param}
    if request.param == EMULATED:
        added = os.environ.get("SD_CXXFLAGS", "")
        variables = {"SD_CPU_ISA": native.sets()[-1], "SD_CXXFLAGS": f"{added} -DSD_AMX_EMULATED"}
    with mock.patch.dict(os.environ, variables):
        native.attempt.cache_clear()
        assert native.load() is not None, native.why_not()
        yield request.param
    native.attempt.cache_clear()

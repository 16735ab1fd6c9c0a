"""Inputs that nobody thought of: how many `make test` and `make test-full` try, and values of parameters.

These two try the same examples on every machine and day: what they refuse is a change's fault, and no draw of lots.
`make fuzz` draws others each time, ten times as many; what it finds is mended, and becomes a test of its own.
"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sd.pictures.parameters import PARAMETERS
from tests.sparing import FULL


def some(few: int, many: int):
    """A test twice: some examples in `make test`, many in `make test-full`."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=FULL)])


def tried(test, examples: int, *strategies: st.SearchStrategy) -> None:
    examples *= 1 if settings.default.derandomize else 10
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    found = settings(max_examples=examples, deadline=None, suppress_health_check=quiet)
    found(given(*strategies)(test))()


NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1, 1e40, -1e40, 1e308, 10**400, -(10**400), 2**63, 2**63 - 1, 20.0, 20.5, 1e-320, -0.0]),
)
TEXTS = st.one_of(
    st.text(max_size=120),
    st.text("()[]:|\\,.0123456789aBREK \x1b\n", max_size=60),
    st.sampled_from(["x" * 101, "\x1b[2J", "<lora:a:1>", "(((", "[a:b:0.5]", "[" * 90, "1,2,3,4"]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def likely(name: str, file: str) -> st.SearchStrategy:
    """What the parameter may take, or nearly, so that others are reached behind it. file: for those that name one."""
    check = PARAMETERS[name].check
    if options := getattr(check, "options", None):
        return st.sampled_from(options)
    if hasattr(check, "low"):
        low, high = check.low, min(check.high, 1100)
        return st.sampled_from([low, high, low + 1, 64, 512]) | st.integers(int(low), int(high))
    if PARAMETERS[name].file:
        return st.just(file)
    return st.sampled_from(["a fox", True, "0,64,0,64"])

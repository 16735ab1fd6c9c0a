"""The cost model against a simulation of containers that take pictures from a queue."""

import heapq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.modal_cost import bill, main

times = st.floats(0.1, 60)


def simulated(pictures: int, containers: int, start: float, load: float, picture: float) -> tuple[float, float]:
    """(seconds, seconds drawing and starting): each container takes the next picture as soon as it is free."""
    first = start + load + picture
    rest = pictures - 1
    containers = max(1, min(containers, rest))
    free = [first] + [first + start + load] * (containers - 1)
    end = first
    for _ in range(rest):
        end = max(end, now := heapq.heappop(free) + picture)
        heapq.heappush(free, now)
    return end, containers * (start + load) + pictures * picture


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 30), times, times, times)
def test_against_a_simulation(pictures, containers, start, load, picture):
    found = bill(pictures, containers, start, load, picture, price=0.5)
    seconds, paid = simulated(pictures, containers, start, load, picture)
    assert found.paid == pytest.approx(paid)
    assert found.dollars == pytest.approx(paid / 2)
    assert abs(found.seconds - seconds) <= picture + 1e-6  # pictures are whole: the last round may be shared otherwise


def test_compiling_is_paid_once_and_waited_for():
    without, with_it = (bill(100, 10, 5, 5, 1, 1, compile=seconds) for seconds in (0, 30))
    assert with_it.seconds - without.seconds == with_it.paid - without.paid == 30


@pytest.mark.parametrize("wrong", [{"pictures": 0}, {"containers": 0}, {"price": -1}, {"load": -1}])
def test_numbers_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=r"must be at least|cannot be negative"):
        bill(**{"pictures": 1, "containers": 1, "start": 1, "load": 1, "picture": 1, "price": 1, **wrong})


def test_the_table(capsys):
    main(["--pictures", "1", "10", "--containers", "2", "--price", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| 1 | 1 | ")
    with pytest.raises(SystemExit):
        main(["--pictures", "0"])

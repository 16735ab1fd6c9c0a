"""What pictures on Modal take and cost, from a few numbers that you measure or look up: `python -m bench.modal_cost`.

    python -m bench.modal_cost --pictures 10000 --containers 10 --picture 2.5 --price 0.000306

It is arithmetic, not a measurement. Assumed are that

- a container is paid from the moment it is asked for until its last picture is done, start and load included (an upper
  bound: Modal says what it counts), at one price a second, which should hold the GPU, the CPU cores and the memory;
- the first picture is drawn alone, then all containers start at once and share the rest evenly (modal_inference.py);
- nothing is preempted, and as many containers are given as are asked for.

start: seconds until a container runs Python. load: until the model is ready, compiled kernels from the cache volume.
picture: seconds of one. compile: once, when the cache is empty.
"""

import argparse
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Bill:
    """seconds: from the command to the last picture. paid: seconds of containers. dollars: for those."""

    seconds: float
    paid: float
    dollars: float


def bill(
    pictures: int,
    containers: int,
    start: float,
    load: float,
    picture: float,
    price: float,
    compile: float = 0.0,
) -> Bill:
    """What `pictures` take in up to `containers`; times in seconds, price in dollars a container-second.

    Raises ValueError for numbers that cannot be.
    """
    if pictures < 1 or containers < 1:
        raise ValueError("pictures and containers must be at least 1")
    if min(start, load, picture, price, compile) < 0:
        raise ValueError("times and the price cannot be negative")
    first = start + load + compile + picture
    rest = pictures - 1
    others = min(containers, rest) - 1  # besides the one that drew the first
    if others < 1:
        seconds = paid = first + rest * picture
    else:
        seconds = first + _shared(rest, others, start + load, picture)
        paid = first + others * (start + load) + rest * picture
    return Bill(seconds, paid, paid * price)


def _shared(rest: int, others: int, delay: float, picture: float) -> float:
    """Seconds until `rest` pictures are done by one container that is ready and `others` that are after `delay`."""
    if picture == 0:
        return 0.0
    alone = min(rest, math.ceil(delay / picture))
    left = max(0, rest - alone)
    return alone * picture + math.ceil(left / (others + 1)) * picture


def table(counts: list[int], containers: list[int], **numbers: float) -> str:
    """A Markdown table: a row for each number of pictures and of containers."""
    rows = ["| pictures | containers | time | paid seconds | dollars |", "|---|---|---|---|---|"]
    for count in counts:
        for many in containers if count > 1 else [1]:
            found = bill(count, many, **numbers)
            rows.append(f"| {count} | {many} | {_time(found.seconds)} | {found.paid:.0f} | {found.dollars:.4f} |")
    return "\n".join(rows)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="modal_cost.py", description="What pictures on Modal take and cost.")
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 10_000], metavar="N")
    parser.add_argument("--containers", type=int, nargs="+", default=[1, 10, 50], metavar="N")
    parser.add_argument("--start", type=float, default=10.0, metavar="S", help="(%(default)s, assumed)")
    parser.add_argument("--load", type=float, default=20.0, metavar="S", help="(%(default)s, assumed)")
    parser.add_argument("--picture", type=float, default=2.5, metavar="S", help="(%(default)s, assumed for an A10)")
    parser.add_argument("--compile", type=float, default=30.0, metavar="S", help="(%(default)s, assumed)")
    parser.add_argument(
        "--price", type=float, default=0.0004, metavar="DOLLARS", help="a second (%(default)s, assumed)"
    )
    args = vars(parser.parse_args(argv))
    try:
        print(table(args.pop("pictures"), args.pop("containers"), **args))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

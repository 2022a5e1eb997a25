"""Tables of reliability. `python -m benchmarks.tables` writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.common import records
from benchmarks.reliability.outcomes import FAILURES

LEFT = {"newer": "newer output", "older": "older output", "named": "an error that names the place", "none": "no output"}
"""What a command leaves behind -> column."""


def fuzz() -> Iterator[list[str]]:
    """Cases of random damage by reader."""
    found = records.result("reliability/fuzz")["readers"]
    yield ["reader", "cases", "read all the same", "refused", *FAILURES]
    for reader, counts in found.items():
        outcomes = ("read", "refused", *FAILURES)
        yield [reader, f"{sum(counts.values()):,}", *(f"{counts.get(name, 0):,}" for name in outcomes)]


def chaos() -> Iterator[list[str]]:
    """What killed commands and disks without space left behind."""
    yield ["command", "what happened", *LEFT.values(), "wrong"]
    for command, outcomes in records.result("reliability/chaos")["left"].items():
        for how, left in outcomes.items():
            wrong = sum(count for name, count in left.items() if name not in LEFT)
            yield [command, how, *(str(left.get(name, 0)) for name in LEFT), str(wrong)]


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {"fuzz": fuzz, "chaos": chaos}

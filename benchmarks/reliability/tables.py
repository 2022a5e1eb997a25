"""Tables of reliability. `python -m benchmarks.tables` writes them."""

from __future__ import annotations

from collections import Counter
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


OUTCOMES = ("mutants", "killed", "timed_out", "equivalent", "survived")


def mutants() -> Iterator[list[str]]:
    """Mutants by module, and in all."""
    found = records.results("reliability/mutants/*")
    total: Counter[str] = Counter()
    for of in found.values():
        total.update({outcome: of[outcome] for outcome in OUTCOMES})
    yield ["module", *(outcome.replace("_", " ") for outcome in OUTCOMES), "killed or equivalent"]
    for module, of in [*((f"`{name}`", of) for name, of in found.items()), ("all", total)]:
        share = 1 - of["survived"] / of["mutants"]
        yield [module, *(str(of[outcome]) for outcome in OUTCOMES), f"{share:.0%}"]


def coverage() -> Iterator[list[str]]:
    """Lines and branches that the tests run, by folder and in all."""
    record = records.result("reliability/coverage")
    total: Counter[str] = Counter()
    for counts in record["folders"].values():
        total.update(counts)
    yield ["folder", "lines", "run", "branches", "run"]
    for folder, of in [*((f"`{name}/`", of) for name, of in record["folders"].items()), ("all", total)]:
        lines, branches = (f"{of[f'{kind}_run'] / of[kind]:.1%}" if of[kind] else "-" for kind in ("lines", "branches"))
        yield [folder, f"{of['lines']:,}", lines, f"{of['branches']:,}", branches]


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "fuzz": fuzz,
    "chaos": chaos,
    "mutants": mutants,
    "coverage": coverage,
}

"""Tables of mutants and of coverage. `python -m benchmarks.tables` writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from benchmarks.common import records

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


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {"mutants": mutants, "coverage": coverage}

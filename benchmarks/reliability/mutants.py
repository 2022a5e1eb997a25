"""Mutants: small errors put into the modules that compute, each of which a test should notice.

    python -m benchmarks.reliability.mutants                        # all modules
    python -m benchmarks.reliability.mutants --only losses          # one module
    python -m benchmarks.reliability.mutants --only losses --reached reached.json    # keeps the tests of each line

Cosmic Ray makes the mutants. Operators are those that PIT, a tool for Java, has by default: each changes what is
computed, and none only breaks types. Annotations are left out, as nothing evaluates them. A mutant meets the tests that
run its line, the quickest first. It is killed when one of them fails. Survivors that change nothing a user could see
are listed in `equivalent.py`; it is an error if a test kills a listed one.
Results: benchmarks/results/reliability/mutants/*.json.
"""

from __future__ import annotations

import ast
import difflib
import fnmatch
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from tqdm.auto import tqdm

from benchmarks.reliability.equivalent import EQUIVALENT, Change
from benchmarks.reliability.mutated_runs import (
    KILLED,
    SURVIVED,
    TIMED_OUT,
    Outcome,
    in_fork,
    preload,
    run_imported,
    with_collected,
)
from benchmarks.reliability.reached import Reached, measure

REPOSITORY = Path(__file__).parents[2]
FOLDER = "modeling_mfn"
MODULES = {
    Path(name).stem: f"{FOLDER}/{name}.py"
    for name in (
        "training/schedules",
        "model/feature_rows",
        "model/interventions",
        "training/losses",
        "model/sparse_code",
        "model/steering",
        "model/mfn_layer",
    )
}
"""Module -> file, quick ones first."""
TESTS = ("tests/model", "tests/training", "--ignore=tests/model/transformers_common")
LEAST_RATE = 0.85
"""Share of mutants that must be killed or equivalent."""

BINARY = "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitAnd_BitOr BitOr_BitAnd"
COMPARISONS = "Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is"
OPERATORS = (
    *(f"ReplaceBinaryOperator_{name}" for name in BINARY.split()),
    *(f"ReplaceComparisonOperator_{name}" for name in COMPARISONS.split()),
    *(f"ReplaceUnaryOperator_Delete_{name}" for name in ("USub", "Invert", "Not")),
    "AddNot",
    "ExceptionReplacer",
    "NumberReplacer",
    "RemoveDecorator",
    "ReplaceAndWithOr",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "ReplaceFalseWithTrue",
    "ReplaceOrWithAnd",
    "ReplaceTrueWithFalse",
    "ZeroIterationForLoop",
)
"""Cosmic Ray's names."""


class Mutant(NamedTuple):
    """A module with one change."""

    operator: str
    line: int
    change: Change
    source: str
    """Whole text of the changed module."""
    in_function: bool
    """True if the change is in the body of a function, which does not run at import."""


def mutants_of(module: str) -> Iterator[Mutant]:
    """Yields all mutants of a module."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    source = (REPOSITORY / MODULES[module]).read_text(encoding="utf-8")
    tree = ast.parse(source)
    left_out = list(_annotations(tree))
    for name in OPERATORS:
        operator = OperatorProvider()[name]()
        places = [start for node in ast_nodes(get_ast(source)) for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(places):
            if not any(first <= start < last for first, last in left_out):
                changed = mutate_code(source, operator, occurrence)
                change = _change(module, tree, source, changed)
                yield Mutant(name, start[0], change, changed, _in_function(tree, start[0]))


def _in_function(tree: ast.AST, line: int) -> bool:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return any(node.body[0].lineno <= line <= (node.end_lineno or 0) for node in functions)


def _annotations(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yields start and end, (line, column), of all annotations."""
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            found = getattr(node, name, None)
            if found is not None:
                yield (found.lineno, found.col_offset), (found.end_lineno, found.end_col_offset)


def _change(module: str, tree: ast.AST, before: str, after: str) -> Change:
    """First lines that differ, and the function or class that they are in."""
    old, new = before.splitlines(), after.splitlines()
    _, first, last, begin, end = next(
        each for each in difflib.SequenceMatcher(None, old, new, False).get_opcodes() if each[0] != "equal"
    )
    names = [
        node.name
        for node in ast.walk(tree)  # outer ones first
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.lineno <= first + 1 <= (node.end_lineno or 0)
    ]
    texts = (" ".join(line.strip() for line in lines) for lines in (old[first:last], new[begin:end]))
    return Change(".".join([module, *names]), *texts)


class Trial(NamedTuple):
    """A mutant and what the tests said."""

    mutant: Mutant
    outcome: str


def try_module(module: str, reached: Reached, seconds: float) -> list[Trial]:
    """Tries all mutants of a module. A mutant meets tests of limited seconds, first those that killed before."""
    file, kills = MODULES[module], Counter[str]()

    def tried(mutants: list[Mutant], run: Callable[..., Outcome]) -> list[Trial]:
        trials = []
        for mutant in tqdm(mutants, desc=module, mininterval=10):
            tests = sorted(reached.tests(file, mutant.line), key=lambda test: -kills[test])
            chosen = _within(tests, reached.seconds, seconds)
            outcome = run(file, mutant.source, chosen, sum(reached.seconds[test] for test in chosen))
            kills[outcome.test] += 1
            trials.append(Trial(mutant, outcome.name))
        return trials

    mutants = list(mutants_of(module))
    inside = [mutant for mutant in mutants if mutant.in_function]
    outside = [mutant for mutant in mutants if not mutant.in_function]
    return with_collected(TESTS, lambda tests: tried(inside, tests.run)) + tried(outside, run_imported)


def _within(tests: list[str], times: dict[str, float], seconds: float) -> list[str]:
    """First tests that take at most some seconds together, but at least one."""
    ends = accumulate(times[test] for test in tests)
    return [test for place, (test, end) in enumerate(zip(tests, ends, strict=True)) if not place or end <= seconds]


def is_equivalent(mutant: Mutant) -> bool:
    """Returns True if `EQUIVALENT` lists a mutant."""
    return any(claim.covers(mutant.change) for claim in EQUIVALENT)


def summary(trials: list[Trial]) -> dict[str, Any]:
    """Counts by outcome, the rate, and the survivors that are not equivalent."""
    counts = Counter(outcome for _, outcome in trials)
    alive = [mutant for mutant, outcome in trials if outcome == SURVIVED and not is_equivalent(mutant)]
    return {
        "mutants": len(trials),
        "killed": counts[KILLED],
        "timed_out": counts[TIMED_OUT],
        "equivalent": counts[SURVIVED] - len(alive),
        "survived": len(alive),
        "rate": 1 - len(alive) / len(trials),
        "survivors": [mutant.change._asdict() | {"operator": mutant.operator} for mutant in alive],
    }


def wrong_claims(module: str, trials: list[Trial]) -> list[Change]:
    """Changes of a module that `EQUIVALENT` lists, though a test fails with them or no mutant makes them."""
    claims = [claim for claim in EQUIVALENT if claim.place.split(".")[0] == module]
    outcomes = {claim: {trial.outcome for trial in trials if claim.covers(trial.mutant.change)} for claim in claims}
    return [claim for claim in claims if not outcomes[claim] or KILLED in outcomes[claim]]


def commit() -> str | None:
    """Commit of the code."""
    from benchmarks.common import records  # brings the package, and processes are forked from one without it

    return records.COMMIT


def write_result(module: str, result: dict[str, Any]) -> None:
    """Writes the result of a module."""
    from benchmarks.common import records

    record = {"command": records.command_line("reliability.mutants"), **result}
    records.write_record(records.RESULTS / "reliability" / "mutants" / f"{module}.json", record)


def main(
    only: Annotated[str, typer.Option(help="Pattern that the names of modules must match.")] = "*",
    seconds: Annotated[float, typer.Option(help="Time of the tests that a mutant meets at most.")] = 5,
    reached: Annotated[Path | None, typer.Option(help="File that keeps the tests of each line between runs.")] = None,
) -> None:
    """Tries the mutants, prints the survivors, and writes a result for each module. Fails if too many survive."""
    os.chdir(REPOSITORY)
    tried = in_fork(commit)
    preload()
    if reached is not None and reached.exists():
        tests = Reached.read(reached)
    else:
        tests = measure(list(MODULES.values()), TESTS)
        if reached is not None:
            tests.write(reached)
    failed = False
    for module in (name for name in MODULES if fnmatch.fnmatch(name, only)):
        trials = try_module(module, tests, seconds)
        found, wrong = summary(trials), wrong_claims(module, trials)
        in_fork(partial(write_result, module, {"commit": tried, **found}))
        for survivor in found["survivors"]:
            print(f"survived in {survivor['place']}: {survivor['before']} -> {survivor['after']}")
        for change in wrong:
            print(f"listed as equivalent, but killed or never made: {change}")
        print(f"{module}: {found['rate']:.1%} of {found['mutants']} mutants killed or equivalent", flush=True)
        failed |= bool(wrong) or found["rate"] < LEAST_RATE
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)

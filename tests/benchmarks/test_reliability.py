"""A short share of `make fuzz`, of `make chaos` and of `make mutation`."""

import random
import subprocess
import sys

import pytest

from benchmarks.common import records
from benchmarks.reliability import branches, fuzz, mutants
from benchmarks.reliability.equivalent import Change
from benchmarks.reliability.mutated_runs import KILLED, SURVIVED, TIMED_OUT
from benchmarks.reliability.mutations import damage_bytes, damage_json
from benchmarks.reliability.outcomes import FAILURES
from benchmarks.reliability.reached import Reached
from benchmarks.reliability.readers import FILES, VALUES

CASES = {"text": 5, "model": 10, "model to share": 10}
"""Cases of slow readers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("reader", [*FILES, *VALUES])
def test_damage_is_refused(reader, folder):
    cases = [fuzz.Case(reader, 7_000_000 + number) for number in range(CASES.get(reader, 25))]
    outcomes = [fuzz.run_case(case, folder) for case in cases]
    assert not [found for found in outcomes if found.outcome in FAILURES]


@pytest.mark.parametrize("reader", FILES)
def test_what_is_not_damaged_is_read(reader, folder):
    FILES[reader].read(fuzz.example(reader, folder))


def test_a_failure_is_told_with_its_place(folder, monkeypatch):
    def read(folder):
        raise KeyError("layers")

    monkeypatch.setitem(fuzz.FILES, "config", fuzz.FILES["config"]._replace(read=read))
    outcomes = [fuzz.run_case(fuzz.Case("config", seed), folder) for seed in (1, 2)]
    assert [found.outcome for found in outcomes] == ["escaped", "escaped"]
    (failure,) = fuzz.summary(outcomes)["failures"].values()
    assert (failure["cases"], failure["seed"]) == (2, 1)
    assert "KeyError" in failure["detail"]


def test_equal_seeds_damage_alike():
    first, again = (damage_bytes(bytes(range(256)), random.Random(3)) for _ in range(2))
    assert first == again != bytes(range(256))
    text = '{"a": [1, 2, {"b": "c"}]}'
    assert damage_json(text, random.Random(3)) == damage_json(text, random.Random(3)) != text


@pytest.mark.slow
def test_a_killed_command_leaves_something_whole():
    """In a process of its own, as the local Hub's address is set before huggingface_hub is imported."""
    subprocess.run([sys.executable, "-m", "benchmarks.reliability.chaos", "--kills", "10", "--only", "?*"], check=True)


MUTATED = """
from pathlib import Path
from benchmarks.reliability import mutated_runs

mutated_runs.preload()
mutated_runs.SPARE_SECONDS = 3
file, tests = "modeling_mfn/training/schedules.py", ["tests/training/test_schedules.py::test_schedules"]
source = Path(file).read_text()
wrong = source.replace("math.cos(", "math.sin(")
endless = source.replace("share = max(", "share = sum(iter(int, 1)) + max(")

def outcomes(collected):
    return [collected.run(file, text, tests, 0).name for text in (source, wrong, endless)]

print(mutated_runs.with_collected(tests, outcomes))
print(mutated_runs.run_imported(file, wrong, tests, 10).name)
"""


@pytest.mark.slow
def test_a_wrong_module_is_killed_and_an_endless_one_stopped():
    """Processes are forked from one that has not imported the package."""
    command = [sys.executable, "-c", MUTATED]
    result = subprocess.run(command, capture_output=True, text=True, cwd=records.REPOSITORY, check=False)
    expected = [str([SURVIVED, KILLED, TIMED_OUT]), KILLED]
    assert result.stdout.splitlines() == expected, result.stderr


MODULE = """\
SCALE = 2.0


def scaled(
    value: float | None = 1,
) -> float:
    return (
        value
        * SCALE
    )


def other(value):
    return value
"""


def test_a_line_has_the_tests_that_run_what_it_is_part_of(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(MODULE)
    reached = Reached(
        {"slow": 2.0, "quick": 1.0, "other": 0.5}, {str(file): {7: ["slow"], 8: ["quick"], 14: ["other"]}}
    )
    for line in (1, 5, 9):  # a constant, a default, and a part of a statement
        assert reached.tests(str(file), line) == ["quick", "slow"]
    assert reached.tests(str(file), 14) == ["other"]


def test_a_listed_mutant_must_survive(monkeypatch):
    made = {outcome: Change("losses.mean", f"return {outcome}(-1)", f"return {outcome}( 1)") for outcome in ("a", "b")}
    killed, survivor = (mutants.Mutant("NumberReplacer", 1, change, "", True) for change in made.values())
    trials = [mutants.Trial(killed, KILLED), mutants.Trial(survivor, SURVIVED)]
    claims = [Change("losses.mean", f"{name}(-1)", f"{name}(1)") for name in ("a", "b", "c")]
    monkeypatch.setattr(mutants, "EQUIVALENT", dict.fromkeys(claims, "same"))
    assert mutants.wrong_claims("losses", trials) == [claims[0], claims[2]]
    found = mutants.summary(trials)
    assert (found["killed"], found["equivalent"], found["survived"], found["rate"]) == (1, 1, 0, 1.0)


def test_coverage_is_counted_by_folder():
    files = {"modeling_mfn/model/a.py": 3, "modeling_mfn/model/b.py": 4, "modeling_mfn/__init__.py": 5}
    report = {"files": {file: {"summary": dict.fromkeys(branches.COUNTS.values(), of)} for file, of in files.items()}}
    assert branches.by_folder(report) == {
        "model": dict.fromkeys(branches.COUNTS, 7),
        "modeling_mfn": dict.fromkeys(branches.COUNTS, 5),
    }

"""A short share of `make fuzz`, of `make chaos` and of `make mutation`."""

import random
import subprocess
import sys

import pytest

from benchmarks.common import records
from benchmarks.reliability import branches, chaos, fuzz, mutants
from benchmarks.reliability.equivalent import Change
from benchmarks.reliability.mutated_runs import KILLED, SURVIVED, TIMED_OUT, Reached
from benchmarks.reliability.mutations import damage_bytes, damage_json
from benchmarks.reliability.outcomes import FAILURES
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
@pytest.mark.parametrize("name", chaos.SCENARIOS)
def test_a_killed_command_leaves_something_whole(name, tmp_path):
    prepared = chaos.prepare(chaos.SCENARIOS[name], tmp_path / "inputs")
    assert chaos.kill_once(prepared, 0.5) in ("newer", "older", "named", "none")


MUTATED = """
from pathlib import Path
from benchmarks.reliability import mutated_runs

mutated_runs.preload()
file = "modeling_mfn/training/schedules.py"
source = Path(file).read_text()
wrong, endless = source.replace("math.cos(", "math.sin("), source + "while True: pass"
for text in (source, wrong, endless):
    mutated_runs.SPARE_SECONDS = 1 if text is endless else 100
    print(mutated_runs.run_mutated(file, text, ["tests/training/test_schedules.py"], 0))
"""


def test_a_wrong_module_is_killed_and_an_endless_one_stopped():
    """Processes are forked from one that has not imported the package."""
    result = subprocess.run(
        [sys.executable, "-c", MUTATED], capture_output=True, text=True, cwd=records.REPOSITORY, check=False
    )
    assert result.stdout.split("\n")[:3] == [SURVIVED, KILLED, TIMED_OUT], result.stderr

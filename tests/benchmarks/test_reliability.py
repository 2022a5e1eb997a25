"""A short share of `make fuzz` and of `make chaos`."""

import random
import subprocess
import sys

import pytest

from benchmarks.reliability import fuzz
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
def test_a_killed_command_leaves_something_whole():
    subprocess.run([sys.executable, "-m", "benchmarks.reliability.chaos", "--kills", "20", "--only", "*"], check=True)

"""Figures of the documents equal the figures drawn from the result files."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from benchmarks import figures

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")]


def kept(name):
    return (figures.IMAGES / f"{name}.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_up_to_date(name):
    drawn = figures.drawn(name)
    assert texts(kept(name)) == texts(drawn)
    if f"<!-- matplotlib {matplotlib.__version__} -->" in kept(name):
        assert kept(name) == drawn
    assert len(drawn) < 40_000


def test_the_figure_of_fidelity_has_the_perplexities_above_dense():
    found = texts(kept("fidelity"))
    for family in ("llama", "gpt2"):
        runs = {
            file.stem: json.loads(file.read_text())["perplexity"]
            for file in RESULTS.glob(f"fidelity/{family}/coding/*.json")
        }
        drawn = [runs[name] for name in figures.RUN_NAMES if name in runs]
        assert len(drawn) > 2
        for run in drawn:
            above = [100 * (run[domain] / runs["dense"][domain] - 1) for domain in run]
            assert {f"{value:.1f}" for value in above} <= set(found)


def test_the_figure_of_verdicts_has_outcomes_and_deciding_figures():
    found = texts(kept("verdicts"))
    files = list(RESULTS.glob("predictions/*-update/P?.json"))
    assert len(files) == 10  # five predictions, two families
    for file in files:
        record = json.loads(file.read_text())
        for subject in ("MFN", record["baseline"]):
            assert f"{record['figures'][subject][record['headline']]['value']:.3g}" in found
        assert record["outcome"] in found


def test_colours_follow_the_readers_scheme():
    svg = kept("verdicts")
    assert "prefers-color-scheme: dark" in svg
    body = svg.partition("</style>")[2]
    assert set(re.findall(r"#[0-9a-f]{6}", body)) <= set(figures.HUES)

"""Files and tables of results."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from modeling_mfn.evaluation import report
from modeling_mfn.evaluation.intervals import Estimate
from modeling_mfn.evaluation.report import (
    complete_figure,
    load_further,
    load_result,
    save_further,
    save_result,
    verdict_table,
    write_report,
)
from modeling_mfn.evaluation.result import MFN, POST_HOC_SAE, PaperCriterion, PredictionResult

PAPER = PaperCriterion(
    "A deviation of at most 0.05.", True, "std", Estimate(0.0123), "random SAE", Estimate(0.01, 0.0, 0.02)
)
SETTINGS = {"models": ["a", "b"], "seed": 0, "tokens": 4096}


FURTHER = {"Compute": {"base": {"parameters": Estimate(10.0)}, "ratio": {"parameters": Estimate(1.5, 1.25, 1.75)}}}


def result(prediction="P1", **changes):
    fields = {
        "prediction": prediction,
        "claim": "Firing rates converge",
        "criterion": "std <= 0.05",
        "outcome": "partly",
        "reason": "std is small, and so is a random SAE's.",
        "headline": "firing_rate_std",
        "figures": {
            MFN: {"dead_share": Estimate(0.0), "firing_rate_std": Estimate(0.0123, 0.011, 0.014)},
            POST_HOC_SAE: {"firing_rate_std": Estimate(0.0456, 0.04, 0.05), "kl": Estimate(math.nan)},
        },
        "baseline": POST_HOC_SAE,
        "paper_criterion": PAPER,
        "details": {"by_layer": {"0": [0.5]}},
    }
    return PredictionResult(**(fields | changes))


def test_a_result_comes_back_if_the_same_settings_are_asked_for(tmp_path):
    saved = result()
    save_result(saved, SETTINGS, tmp_path)
    found = load_result("P1", SETTINGS, tmp_path)
    assert found.to_json() == saved.to_json()
    assert str(found.figures[MFN]) == str(saved.figures[MFN])
    assert load_result("P1", SETTINGS | {"seed": 1}, tmp_path) is None
    assert load_result("P2", SETTINGS, tmp_path) is None
    save_further(FURTHER, SETTINGS, tmp_path)
    assert str(load_further(SETTINGS, tmp_path)) == str(FURTHER)
    assert load_further(SETTINGS | {"seed": 1}, tmp_path) is None
    json.loads((tmp_path / "P1.json").read_text(), parse_constant=pytest.fail)
    assert ElementTree.parse(tmp_path / "figures/P1.svg").getroot().tag.endswith("svg")


def test_a_figure_that_fails_leaves_the_measurement(tmp_path, monkeypatch):
    def fail(result):
        raise RuntimeError("no such font")

    monkeypatch.setattr(report, "draw", fail)
    with pytest.raises(RuntimeError, match="no such font"):
        save_result(result(), SETTINGS, tmp_path)
    found = load_result("P1", SETTINGS, tmp_path)
    assert found.to_json() == result().to_json()
    monkeypatch.undo()
    file = tmp_path / "figures/P1.svg"
    complete_figure(found, tmp_path)
    assert ElementTree.parse(file).getroot().tag.endswith("svg")
    file.write_text("is there")
    complete_figure(found, tmp_path)
    assert file.read_text() == "is there"
    save_result(found, SETTINGS, tmp_path)
    assert file.read_text() != "is there"


def drawn(axes):
    return [line.get_xydata().tolist() for line in axes.lines]


def test_a_figure_has_every_value_and_the_curves_of_what_was_measured():
    by_strength = {
        MFN: {"4.0": {"KL": Estimate(0.5)}, "0.0": {"KL": Estimate(0.25), "correlation of logits": Estimate(0.75)}}
    }
    before = result("P4", details={"by_strength": by_strength})
    for found in (before, PredictionResult.from_json(json.loads(json.dumps(before.to_json())))):
        axes = {axes.get_title(): axes for axes in report.draw(found).axes}
        assert drawn(axes["KL"]) == [[[0, 0.25], [4, 0.5]]]
        assert drawn(axes["correlation of logits"]) == [[[0, 0.75]]]
        assert not drawn(axes["unpredicted tokens"])
        assert drawn(axes["dead share"]) == [[[0, 0]]]
        assert drawn(axes["firing rate std"]) == [
            [[0.0123, 0]], [[0.011, 0], [0.014, 0]], [[0.0456, 1]], [[0.04, 1], [0.05, 1]]
        ]  # fmt: skip
        assert not drawn(axes["kl"])  # NaN
    (rates, *_) = report.draw(result("P1", details={"rate_quantiles": {POST_HOC_SAE: [0.1, 0.2, 0.4]}})).axes
    assert drawn(rates) == [[[0, 0.1], [0.5, 0.2], [1, 0.4]]]
    (shares, *_) = report.draw(result("P3", details={"share_above": {MFN: {0.5: 0.25, 0.0: 1.0}}})).axes
    assert drawn(shares) == [[[0, 1], [0.5, 0.25]]]


def test_the_report_shows_every_verdict_and_figure(tmp_path):
    unknown = replace(PAPER, met=None)
    missing = result(
        "P5", outcome="not measured", headline="loss", figures={}, reason="No second domain was given.",
        paper_criterion=unknown,
    )  # fmt: skip
    tokens = (
        MarkdownIt().enable("table").parse(write_report([result(), missing], FURTHER, SETTINGS, tmp_path).read_text())
    )
    cells = [token.content for before, token in pairwise(tokens) if before.type.startswith("td_open")]
    rows = [cells[start : start + 5] for start in (0, 5)]
    assert rows[0] == [
        "**P1** Firing rates converge", "partly", "firing rate std: 0.0123 [0.011, 0.014]",
        "post-hoc SAE: 0.0456 [0.04, 0.05]", "met: std 0.0123 (random SAE: 0.01 [0, 0.02])",
    ]  # fmt: skip
    assert rows[1][1:] == ["not measured", "", "", "not measured"]
    assert cells[10:] == [
        "dead share",
        "0",
        "",
        "firing rate std",
        "0.0123 [0.011, 0.014]",
        "0.0456 [0.04, 0.05]",
        "kl",
        "",
        "-",
        *("parameters", "10", "1.5 [1.25, 1.75]"),
    ]
    text = "\n".join(token.content for token in tokens if token.type == "inline")
    assert "No second domain was given." in text
    assert "The paper's own: A deviation of at most 0.05. met: std 0.0123" in text.replace("**", "")
    assert "figures/P1.svg" in text
    assert "figures/P5.svg" not in text


def test_the_terminal_shows_the_papers_own_criterion_next_to_the_outcome():
    console = Console(width=80, record=True)
    console.print(verdict_table([result()]))
    columns = zip(*(row.split("│")[1:-1] for row in console.export_text().splitlines() if row[0] == "│"), strict=True)
    found = [" ".join(" ".join(cells).split()) for cells in columns]
    assert found == [
        "P1 Firing rates converge", "partly", "std is small, and so is a random SAE's.",
        "met: std 0.0123 (random SAE: 0.01 [0, 0.02])",
    ]  # fmt: skip

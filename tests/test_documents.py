"""Tables of the documents equal the tables made from the result files."""

import json
import math

import pytest

from benchmarks import tables
from benchmarks.common import records
from benchmarks.small import tables as small_tables
from benchmarks.smollm2 import tables as smollm2_tables
from modeling_mfn.evaluation.intervals import Estimate
from modeling_mfn.evaluation.result import MFN, POST_HOC_SAE, RANDOM_SAE, PaperCriterion, PredictionResult, plain


@pytest.mark.parametrize("document", tables.documents(), ids=lambda file: file.name)
def test_tables_show_what_the_results_hold(document):
    text = document.read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == text.count("<!-- end -->") > 0
    assert tables.rewritten(text) == text


def test_every_table_is_shown():
    shown = [name for page in tables.documents() for _, name, _ in tables.MARKED.findall(page.read_text("utf-8"))]
    assert set(shown) == set(tables.TABLES)


def test_a_table_of_made_up_results(tmp_path, monkeypatch):
    """The invented run of two layers is 10 % above dense in two domains and equal to dense in one."""
    features = {"explained_variance": 0.9, "firing_rate_std": 0.02, "firing_rate_cv": 1.0, "dead_share": 0.0}
    dense = {"perplexity": {"drama": 50.0, "dictionary": 20.0, "code": 30.0}}
    usual = {
        "settings": {"k": 32, "seed": 0},
        "perplexity": {"drama": 55.0, "dictionary": 22.0, "code": 30.0},
        "features": {"layer_0": features, "layer_1": features | {"explained_variance": 0.8, "dead_share": 0.01}},
    }
    changed = usual | {
        "settings": {"k": 64, "seed": 0},
        "perplexity": {d: 2 * p for d, p in dense["perplexity"].items()},
    }
    runs = {
        "short/dense": dense,
        "short/recon-util": usual,
        "sweep/k-64": changed,
        "main/dense": dense,
        "main/x": usual,
    }
    for name, record in runs.items():
        write_json(tmp_path / "fidelity" / "llama" / f"{name}.json", record)
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    rows = [
        dict(zip(header, row, strict=True))
        for header, *body in [list(small_tables.fidelity_group("llama", "sweep"))]
        for row in body
    ]
    assert [row["run"] for row in rows] == ["dense", "recon-util", "k-64"]
    assert rows[1]["above dense, mean"] == f"{20 / 3:.1f} %"
    assert rows[2]["above dense, mean"] == "100.0 %"
    assert rows[2]["what differs"] == "`k=64`"
    assert math.isclose(float(rows[1]["explained variance"]), 0.85)
    assert rows[1]["dead features"] == "0.5 %"
    assert list(small_tables.fidelity())[-1] == [
        "Llama, x", "55.0", "22.0", "30.0", "10.0 / 10.0 / 0.0 %", "0.900 0.800", "0.0 - 1.0 %",
    ]  # fmt: skip


def test_the_table_of_a_real_checkpoint(tmp_path, monkeypatch):
    """Zero ablation costs 4 nats, mean ablation would cost 2, and the features cost half a nat."""

    def costs(delta):
        of_domains = dict.fromkeys((*small_tables.DOMAINS, "mean"), delta)
        recovered = {f"recovered_of_{name}": {"mean": 1 - delta / whole} for name, whole in (("zero", 4), ("mean", 2))}
        return {"delta": of_domains, "delta_standard_error": 0.1} | recovered

    figures = {"explained_variance": 0.75, "dead_share": 0.25}
    places = ("all_layers", "layer_6", "layer_12")
    summary = {"all_positions": {place: {"zero": costs(4.0), "features": costs(0.5)} for place in places}}
    summary["without_first"] = {"all_layers": {"zero": costs(4.0), "features": costs(0.25)}}
    folder = tmp_path / "real_checkpoint"
    write_json(folder / "summary.json", summary)
    write_json(folder / "evaluate" / "zero.json", {})
    write_json(folder / "evaluate" / "features.json", {"layer_6": figures, "layer_12": figures})
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    header, zero, features = list(smollm2_tables.real_checkpoint())
    assert len(header) == len(zero) == len(features)
    assert zero[0] == "zero ablation"
    assert zero[4:8] == ["4.000", "0.0 / -100.0 %", "4.000", "0.0 / -100.0 %"]
    assert features == [
        "features", *["0.500"] * 4, "87.5 / 75.0 %", "0.250", "93.8 / 87.5 %", "0.500 0.500", "0.750 0.750", "25.0 %",
    ]  # fmt: skip


def write_json(file, record):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))


def test_the_tables_of_predictions(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    folder = tmp_path / "predictions"
    figures = {MFN: {"gap_now": Estimate(0.5, 0.25, 0.75)}, POST_HOC_SAE: {"gap_now": Estimate(2.0)}}
    paper = PaperCriterion("It flies.", True, "height", Estimate(3.0), RANDOM_SAE, Estimate(1.0))
    for prediction, family, outcome in (
        ("P3", "llama", "partly"),
        ("P1", "gpt2", "confirmed"),
        ("P3", "gpt2", "partly"),
    ):
        result = PredictionResult(prediction, "They fly.", "", outcome, "", "gap_now", figures, POST_HOC_SAE, paper)
        write_json(folder / f"{family}-update" / f"{prediction}.json", {"settings": {}} | result.to_json())
    met = "met: height 3 (random SAE: 1)"
    assert list(small_tables.verdict_table("stream"))[1:] == []
    assert list(small_tables.verdict_table("update"))[1:] == [
        ["P1 They fly.", "GPT-2", "confirmed", "gap now", "0.5 [0.25, 0.75]", "post-hoc SAE: 2", met],
        ["P3 They fly.", "Llama", "partly", "gap now", "0.5 [0.25, 0.75]", "post-hoc SAE: 2", met],
        ["P3", "GPT-2", "partly", "gap now", "0.5 [0.25, 0.75]", "post-hoc SAE: 2", met],
    ]

    for name, value in (("all/as-it-is", 0.25), ("P2/b", 0.5), ("P3/c", 0.75), ("P5/as-it-is", 1.0)):
        own = {}
        for of, subject, figure in small_tables.REMEDY_FIGURES.values():
            own.setdefault(of, {}).setdefault(subject, {})[figure] = Estimate(value)
        record = {"changes": {"epochs": 8} if name == "P2/b" else {}, "figures": plain(own)}
        write_json(
            folder / "gpt2" / "remedies" / f"{name}.json",
            record | {"perplexity": {d: [1, 2] for d in small_tables.DOMAINS}},
        )
    header, usual, remedy = small_tables.remedies("gpt2", "P2")
    assert usual == ["as-it-is", "", *["0.25"] * 12, "1.5 / 1.5 / 1.5"]
    assert remedy == ["b", "epochs from the cache: 8", *["0.5"] * 12, "1.5 / 1.5 / 1.5"]
    assert len(header) == len(usual)
    assert [row[:3] for row in small_tables.remedies("gpt2", "P5")][1:] == [["as-it-is", "", "1"]]
    assert [row[0] for row in small_tables.remedies("gpt2", "P2", "P3")][1:] == ["as-it-is", "P2/b", "P3/c"]


def test_the_table_of_what_settings_change(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    of_seeds = {"value": 0.0104, "low": -0.01, "high": 0.0308}
    together = {"value": -0.0123, "low": -0.0123, "high": -0.0123}
    cost = {"value": 12.34, "low": 11.0, "high": 13.68}
    summary = {"k-8": {"alpha": 1.0, "purity": of_seeds, "perplexity, %": cost, "alignment: of all": together}}
    usual = {"settings": {"lambda_stab": 2.5}}
    changes = {"k-8": usual | {"size": {"k": 8}}, "all-five": usual}
    write_json(tmp_path / "sensitivity" / "summary.json", summary)
    for name, of in changes.items():
        write_json(tmp_path / "sensitivity" / f"{name}.json", {"changes": of})
    assert list(small_tables.sensitivity()) == [
        ["run", "what differs", "purity", "perplexity, %", "of all"],
        ["k-8", "`k=8`", "+0.010 [-0.010, +0.031]", "+12.3 [+11.0, +13.7]", "-0.012"],
    ]


def test_the_main_results_at_a_glance():
    """Compares the table with figures computed here from the result files."""
    rows = {row[0]: row[1:] for row in tables.glance()}
    assert len(rows) <= 12
    dense, run = (
        json.loads((records.RESULTS / "fidelity" / "llama" / "coding" / f"{name}.json").read_text())["perplexity"]
        for name in ("dense", tables.RUN)
    )
    gap = sum(run[domain] / dense[domain] for domain in dense) / len(dense) - 1
    assert rows["Perplexity, Llama, k = 32"][0] == f"{gap:.0%} above dense".replace("%", " %")
    joint = json.loads((records.RESULTS / "all_blocks" / "evaluate" / "joint.json").read_text())
    assert f"{joint['lost_to_dense']['mean']:.2f} nats" in rows["Loss, SmolLM2-135M, all 30 blocks, k = 32"][0]
    layer = json.loads((records.RESULTS / "layer.json").read_text())["ratios"]
    times = layer["sparsify"]["both"] / layer["modeling_mfn"]["both"]
    assert rows["Time of a layer, next to sparsify"][0] == f"{times:.1f} times as fast"
    for number in range(1, 6):
        (row,) = (cells for name, cells in rows.items() if name.startswith(f"P{number}: "))
        for family, title in (("llama", "Llama"), ("gpt2", "GPT-2")):
            folder = records.RESULTS / "predictions" / f"{family}-update"
            result = json.loads((folder / f"P{number}.json").read_text())
            assert f"{title}: {result['outcome']}" in row[0]
            assert f"{result['figures']['MFN'][result['headline']]['value']:.3g}" in row[1]

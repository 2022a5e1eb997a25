"""The `evaluate` metrics load without a network and agree with closed forms and with the package's own measures."""

import doctest
import math
import socket
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from conftest import make_base, make_mfn, tokens
from datasets import Dataset
from huggingface_hub import SpaceCard
from scipy.linalg import hadamard

from modeling_mfn.evaluation.measures.firing_rates import rate_measures
from modeling_mfn.evaluation.metrics import NAMES, path
from modeling_mfn.evaluation.predictions.p5_transfer import _of_training
from modeling_mfn.features.comparison import compare_features


@pytest.fixture
def load(tmp_path):
    return lambda name: evaluate.load(path(name), cache_dir=str(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_loads_without_a_network_and_does_what_its_documents_say(name, load, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    folder = Path(path(name))
    before = {file: file.read_bytes() for file in folder.rglob("*")}
    metric = load(name)
    assert metric.name == name
    assert metric.module_type == "metric"
    assert "doi" in metric.citation
    examples = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, name, None, 0)
    assert doctest.DocTestRunner().run(examples) == (0, len(examples.examples))
    card = folder / "README.md"
    found = doctest.testfile(str(card), module_relative=False)
    assert found.failed == 0
    assert found.attempted >= 5
    assert {"evaluate", "metric"} <= set(SpaceCard.load(card).data.tags)
    for part in ("Metric Description", "How to Use", "Limitations and Bias", "Citation", "Further References"):
        assert f"## {part}" in card.read_text()
    assert {file: file.read_bytes() for file in folder.rglob("*")} == before


def test_no_such_metric():
    with pytest.raises(ValueError, match="no metric 'purity'; there are firing_rate_calibration"):
        path("purity")


def test_outputs_are_what_the_cards_list(load):
    inputs = {
        "firing_rate_calibration": {"predictions": [0.1, 0.2]},
        "probe_purity": {"predictions": [0.1, 0.2], "references": [0, 1], "baseline": [0.2, 0.1]},
        "cross_seed_alignment": {"predictions": [[0.0], [1.0]], "references": [[1.0], [3.0]]},
        "intervention_predictability": {"predictions": [0.1, 0.2], "references": [0.0, 1.0]},
        "transfer_gap": {"predictions": [3.0], "references": [2.0], "source": (3.0, 2.0)},
    }
    for name in NAMES:
        values = (Path(path(name)) / "README.md").read_text().split("### Output Values")[1].split("####")[0]
        listed = [part for line in values.splitlines() if line.startswith("- ") for part in line.split("**")[1::2]]
        assert list(load(name).compute(**inputs[name])) == listed


@pytest.mark.parametrize("rates", [np.full(9, 0.25), np.linspace(0, 0.9, 40) ** 3, np.eye(1, 8)[0]])
def test_firing_rates_are_judged_as_p1_does(load, rates):
    found = load("firing_rate_calibration").compute(predictions=rates, rho=0.25)
    assert list(found.values()) == pytest.approx(list(rate_measures(rates, 0.25).values()))


def test_firing_rates_in_closed_form(load):
    """Half of the rates are 0 and half are 2 rho, so that std is rho and CV is 1."""
    found = load("firing_rate_calibration").compute(predictions=np.tile([0.0, 0.2], 8))
    kl = (-math.log(0.9) + 0.2 * math.log(2) + 0.8 * math.log(0.8 / 0.9)) / 2
    expected = {"active_features": 1.6, "mean": 0.1, "std": 0.1, "coefficient_of_variation": 1, "kl": kl}
    assert found == pytest.approx(expected | {"dead_share": 0.5, "evenness": math.log(8) / math.log(16)})


def test_probe_purity_counts_pairs_in_the_right_order(load):
    """Positives at 2 and 4, negatives at 1 and 3: three of four pairs are in order. Ties of the baseline count half."""
    found = load("probe_purity").compute(predictions=[2, 4, 1, 3], references=[1, 1, 0, 0], baseline=[1, 1, 1, 1])
    precision = (1 + 2 / 3) / 2
    expected = {"auroc": 0.75, "average_precision": precision, "baseline_auroc": 0.5, "gain": 0.5}
    assert found == pytest.approx(expected | {"error_reduction": 0.5})


def test_cross_seed_alignment_of_orthogonal_columns(load):
    """Two of four features are shared and the others uncorrelated: CKA is 2/4, and half of the pairs match."""
    columns = hadamard(16)[:, 1:].astype(float)
    a, b = columns[:, [0, 1, 2, 3]], columns[:, [7, 1, 0, 9]]
    found = load("cross_seed_alignment").compute(predictions=a, references=b, permutations=0)
    assert math.isnan(found.pop("mean_similarity_at_chance"))
    shares = {f"matched_{level}": 0.5 for level in (0.7, 0.8, 0.9)}
    assert found == pytest.approx({"cka": 0.5, "mean_similarity": 0.5, "pairs": 4} | shares)


def test_cross_seed_alignment_is_that_of_compare_features(load):
    """Compares codes with features that never vary, and directions."""
    models = [make_mfn(make_base("llama-tied"), layers=[1], seed=seed) for seed in (1, 2)]
    for parameters in zip(*(model.mfn_layers[1].parameters() for model in models), strict=True):
        parameters[1].data.lerp_(parameters[0].data, 0.6)
    data = Dataset.from_dict(tokens(12, 16))
    expected = compare_features(*models, data, layer=1)
    with torch.no_grad():
        outputs = [model(input_ids=torch.tensor(data["input_ids"]), output_codes=True) for model in models]
    codes = [out.codes[1].to_dense().flatten(0, 1).numpy() for out in outputs]
    directions = [model.mfn_layers[1].directions().detach().T.numpy() for model in models]
    metric = load("cross_seed_alignment")
    for (a, b), matching, center in ((codes, expected.activations, True), (directions, expected.directions, False)):
        found = metric.compute(predictions=a, references=b, center=center)
        assert found["mean_similarity"] == pytest.approx(matching.similarities.mean(), abs=1e-6)
        assert found["pairs"] == len(matching.pairs)
        assert [found[f"matched_{level}"] for level in (0.7, 0.8, 0.9)] == list(matching.shares.values())
        assert found["mean_similarity_at_chance"] < found["mean_similarity"]


def test_intervention_predictability_with_an_orthogonal_error(load):
    """The real change is 2 predicted + error. The error is orthogonal to it and as long, and all have mean 0."""
    predicted, error = hadamard(8)[1].astype(float), hadamard(8)[2] * 2.0
    found = load("intervention_predictability").compute(predictions=predicted, references=2 * predicted + error)
    expected = {"correlation": math.sqrt(0.5), "slope": 2, "relative_error": math.sqrt(5 / 8), "sign_agreement": 1}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    found = load("intervention_predictability").compute(predictions=[1, 2, 3, 4], references=[-1, 0, 1e3, 1e9])
    assert (found["rank_correlation"], found["sign_agreement"]) == pytest.approx((1, 2 / 3))
    found = load("intervention_predictability").compute(predictions=[0, 0], references=[1, 2])
    assert found["relative_error"] == 1
    assert math.isnan(found["correlation"])


def test_transfer_gap_in_closed_form(load):
    found = load("transfer_gap").compute(predictions=[8.4, 20.0], references=[8.0, 16.0], source=(11.0, 10.0))
    mean_gap = 0.15
    assert found.pop("gaps") == pytest.approx([0.05, 0.25])
    expected = {"mean_gap": mean_gap, "worst_gap": 0.25, "share_within": 0.5, "source_gap": 0.1}
    assert found == pytest.approx(expected | {"excess_gap": (1 + mean_gap) / 1.1 - 1})


def test_transfer_is_judged_as_p5_does(load):
    random = np.random.default_rng(0)
    reference = dict(zip("abc", random.uniform(2, 30, 3), strict=True))
    own = {domain: perplexity * random.uniform(1, 4) for domain, perplexity in reference.items()}
    draws = {
        domain: {
            "perplexity": np.array([own[domain]]),
            "reference_perplexity": np.array([reference[domain]]),
            "perplexity_loss": np.array([own[domain] / reference[domain] - 1]),
            "backbone_loss": np.zeros(1),
            "explained_variance": np.ones(1),
        }
        for domain in "abc"
    }
    expected = _of_training("b", draws)
    given = {"predictions": [own["a"], own["c"]], "references": [reference["a"], reference["c"]]}
    found = load("transfer_gap").compute(**given, source=(own["b"], reference["b"]))
    names = {"mean_gap": "perplexity_loss_targets", "source_gap": "perplexity_loss_source", "excess_gap": "excess_gap"}
    assert {of: found[name] for name, of in names.items()} == pytest.approx(
        {of: expected[of].item() for of in names.values()}
    )


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("firing_rate_calibration", {"predictions": [0.5, 1.5]}, "from 0.5 to 1.5"),
        ("firing_rate_calibration", {"predictions": [0.5], "rho": 0}, "rho is 0"),
        ("probe_purity", {"predictions": [0.5, 1], "references": [1, 1]}, r"references are \[1\]"),
        ("probe_purity", {"predictions": [0.5, 1], "references": [0, 1], "tasks": ["a"]}, "tasks has 1 entries for 2"),
        ("probe_purity", {"predictions": [1, 2], "references": [0, 1], "tasks": ["a", "b"]}, "of task a are"),
        ("cross_seed_alignment", {"predictions": [[1.0], [1.0, 2.0]], "references": [[1.0], [2.0]]}, r"\[1, 2\]"),
        ("intervention_predictability", {"predictions": [0.1, 1], "references": [0, 0]}, "all 2 references are 0"),
        ("transfer_gap", {"predictions": [0.5], "references": [2.0]}, "as low as 0.5"),
    ],
)
def test_what_is_out_of_range_is_refused(load, name, inputs, message):
    with pytest.raises(ValueError, match=message):
        load(name).compute(**inputs)

"""Attribution graphs: sums that must hold, the fields that viewers ask for, and circuit-tracer's influence."""

import json
import math
from collections import defaultdict

import numpy as np
import pytest
from conftest import make_base, make_mfn
from features_folder import built
from tokenizers_for_tests import numbered_words

from modeling_mfn import FeatureAtlas, explain

TEXT = "w9 w33 w5 w71 w20 w9 w60"
TOKENIZER = numbered_words()
NODE = {
    "node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str, "jsNodeId": str, "clerp": str,
}  # fmt: skip
"""Required fields of a node in Neuronpedia's `graph-schema.json` and in circuit-tracer's `graph_models.py`."""
METADATA = {"slug": str, "scan": str, "transcoder_list": list, "prompt_tokens": list, "prompt": str}
PARAMETERS = {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str}
TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}


@pytest.fixture(params=[("llama-tied", "stream"), ("gpt2-tied", "update")], ids=["llama", "gpt2 updates"])
def explanation(request):
    family, codes = request.param
    model = make_mfn(make_base(family).double(), layers=[0, 2], k=6, codes=codes, alpha=0.7)
    return explain(model, TOKENIZER, TEXT, 5, top=4, trace=5, verify=0)


def has(record, fields):
    assert set(fields) <= set(record)
    for name, kind in fields.items():
        assert type(record[name]) is kind, name


def into(graph, target):
    """Links into a node, each with the node it comes from."""
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    return [(nodes[link["source"]], link["weight"]) for link in graph["links"] if link["target"] == target]


def test_fields_are_those_that_the_viewers_ask_for(explanation):
    graph = json.loads(json.dumps(explanation.to_graph("my-graph"), allow_nan=False))
    assert set(graph) == {"metadata", "qParams", "nodes", "links"}
    has(graph["metadata"], METADATA)
    has(graph["qParams"], PARAMETERS)
    assert graph["metadata"]["slug"] == "my-graph"
    assert graph["metadata"]["prompt_tokens"] == TEXT.split()[:6]
    names = [node["node_id"] for node in graph["nodes"]]
    assert len(set(names)) == len(names)
    for node in graph["nodes"]:
        has(node, NODE)
        assert node["feature_type"] in TYPES
        assert 0 <= node["ctx_idx"] < 6
        assert node["layer"] in ("E", "0", "2", "3")
        assert (node["influence"] is None) == (node["feature_type"] == "logit")
    # the viewers tell nodes of one layer and token apart by this number
    places = [(node["layer"], node["feature"], node["ctx_idx"]) for node in graph["nodes"]]
    assert len(set(places)) == len(places)
    assert len({(link["source"], link["target"]) for link in graph["links"]}) == len(graph["links"])
    for link in graph["links"]:
        assert {link["source"], link["target"]} <= set(names)
        assert math.isfinite(link["weight"])


def test_links_into_the_logit_add_up_to_the_value_in_each_layer(explanation):
    graph = explanation.to_graph()
    (logit,) = (node for node in graph["nodes"] if node["feature_type"] == "logit")
    target = explanation.target
    assert (logit["feature"], logit["token_prob"], logit["ctx_idx"]) == (target.token_id, target.probability, 5)
    assert float(logit["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(target.probability, abs=5e-4)
    sums, by_token = defaultdict(float), defaultdict(lambda: np.zeros(6))
    for source, weight in into(graph, logit["node_id"]):
        sums[source["layer"]] += weight
        if source["feature_type"] == "cross layer transcoder" or "not listed" in source["clerp"]:
            by_token[source["layer"]][source["ctx_idx"]] += weight
    accounts = {str(layer.layer): layer for layer in explanation.layers}
    assert set(sums) == {*accounts, *([] if explanation.embeddings is None else ["E"])}
    assert list(sums.values()) == pytest.approx([target.value] * len(sums), abs=1e-6)
    for layer, account in accounts.items():
        np.testing.assert_allclose(by_token[layer], account.by_token, atol=1e-8)
        rest = [
            weight
            for source, weight in into(graph, logit["node_id"])
            if source["layer"] == layer and source["clerp"].startswith(("value with all", "remainder"))
        ]
        assert rest == pytest.approx([account.baseline, account.remainder])


def test_features_are_nodes_with_their_activations_and_links(explanation):
    graph = explanation.to_graph()
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    logit = next(name for name, node in nodes.items() if node["feature_type"] == "logit")
    traced, seen = 0, set()
    for feature in explanation.features:
        for place, activation, attribution in zip(
            feature.positions, feature.activations, feature.attributions, strict=True
        ):
            node = nodes[f"{feature.layer}_{feature.index}_{place}"]
            seen.add(node["node_id"])
            assert (node["activation"], node["clerp"]) == (activation, feature.name)
            assert [w for source, w in into(graph, logit) if source is node] == [attribution]
            # Neuronpedia's getLayerFromCantorValue and getIndexFromCantorValue
            diagonal = int((math.sqrt(8 * node["feature"] + 1) - 1) // 2)
            index = node["feature"] - diagonal * (diagonal + 1) // 2
            assert (diagonal - index, index) == (feature.layer, feature.index)
            links = into(graph, node["node_id"])
            if feature.inputs is None or place != feature.position:
                assert not links
                continue
            traced += 1
            assert sum(weight for _, weight in links) == pytest.approx(feature.inputs.value, abs=1e-8)
            assert feature.inputs.value == pytest.approx(activation)
            from_tokens = {source["ctx_idx"]: w for source, w in links if source["feature_type"] == "embedding"}
            assert from_tokens == {t: part for t, part in enumerate(feature.inputs.by_token) if part}
    assert traced == 5
    assert seen == {name for name, node in nodes.items() if node["feature_type"] == "cross layer transcoder"}


def test_influence_is_circuit_tracers(explanation):
    """Computed here from powers of the matrix of normalised links, as circuit-tracer's `prune_graph` does."""
    graph = explanation.to_graph()
    place = {node["node_id"]: number for number, node in enumerate(graph["nodes"])}
    matrix = np.zeros((len(place), len(place)))
    for link in graph["links"]:
        matrix[place[link["target"]], place[link["source"]]] = abs(link["weight"])
    matrix /= np.maximum(matrix.sum(1, keepdims=True), 1e-10)
    start = np.array([node.get("token_prob", 0.0) for node in graph["nodes"]])
    influence = start @ (matrix + matrix @ matrix)
    assert not (matrix @ matrix @ matrix).any()
    shares = {
        node["node_id"]: influence[influence >= influence[place[node["node_id"]]] - 1e-15].sum() / influence.sum()
        for node in graph["nodes"]
        if node["feature_type"] != "logit" and influence[place[node["node_id"]]] > 0
    }
    found = {node["node_id"]: node["influence"] for node in graph["nodes"]}
    assert {name: found[name] for name in shares} == pytest.approx(shares)


def test_a_label_and_the_models_name_are_shown(tmp_path):
    model = make_mfn(make_base("llama-tied"), layers=[0, 2])
    atlas = FeatureAtlas(built().metadata, built().features, built().examples)
    for name in atlas:
        atlas.label(name, f"about {name}\n")
    (tmp_path / "My GPT").mkdir()
    model.config.name_or_path = str(tmp_path / "My GPT")
    explanation = explain(model, TOKENIZER, TEXT, top=2, verify=0, trace=0, atlas=atlas)
    assert explanation.model == "My GPT"
    graph = explanation.to_graph()
    assert graph["metadata"]["scan"] == "my-gpt"
    features = [node for node in graph["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert {node["clerp"] for node in features} == {f"about {f.name}\\n" for f in explanation.features}

"""Answers of the explorer's server, compared with direct calls of the library."""

import json

import numpy as np
import planted
import pytest
import torch
from conftest import VOCABULARY
from explored_model import ACTIVE, PRUNED, generated, made, site

from modeling_mfn import explain
from modeling_mfn.explorer.server.token_pieces import TokenPieces
from modeling_mfn.model.feature_names import parse_feature
from modeling_mfn.model.modes import unsteered

pytest.importorskip("fastapi")
testclient = pytest.importorskip("fastapi.testclient")

TEXT = "the king, and 2 queens."
STEERED = {
    "L0/3": {"kind": "clamp", "value": 30.0},
    "L2/9": {"kind": "add", "value": 5.0, "when": "L1/5", "above": 0.1},
}
CONTROL = {"L0/4": {"kind": "clamp", "value": 30.0}}


@pytest.fixture(scope="module")
def client():
    from modeling_mfn.explorer.server.app import create_app

    with testclient.TestClient(create_app(*made(), site()), base_url="http://localhost") as found:
        yield found


def post(client, path, **body):
    answer = client.post(f"/api/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client, **body):
    answer = client.post("/api/generate", json=body)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def ids_of(text):
    return made()[1](text, return_tensors="pt")["input_ids"]


@torch.no_grad()
def probabilities(interventions, ids):
    model = made()[0]
    with unsteered(model), model.steer(interventions):
        return model(ids).logits[0, -1].float().softmax(-1)


def test_a_session_tells_its_limits_and_that_the_active_preset_is_left_out(client):
    session = client.get("/api/session").json()
    assert session["live"] is True
    assert session["writable"] is False
    assert session["limits"]["text_tokens"] == 128  # the model's, which is less than the server's
    assert session["active_preset"] == ACTIVE
    assert session["device"] == "cpu"
    with torch.no_grad():
        active = made()[0](ids_of(TEXT)).logits[0, -1].softmax(-1)  # a plain call has the active preset
    plain = probabilities({}, ids_of(TEXT))
    assert not torch.allclose(active, plain, atol=0.01)
    told = [share for _, share in post(client, "predict", text=TEXT)["plain"]]
    assert told == pytest.approx(plain.topk(10).values.tolist())


def test_a_reading_has_the_features_and_tokens_that_the_atlas_finds(client):
    model, tokenizer, atlas = made()
    told = post(client, "read", text=TEXT, k=2)
    every = atlas.top(TEXT, model, tokenizer, k=1000)
    assert [token["token_id"] for token in told["tokens"]] == [token.token_id for token in every]
    assert [token["next"][0][0] for token in told["tokens"]] == [token.next_token for token in every]
    assert [layer["layer"] for layer in told["layers"]] == model.config.layers
    for layer in told["layers"]:
        for position, token in enumerate(every):
            active = [each for each in token.features if parse_feature(each.feature)[0] == layer["layer"]][:2]
            expected = [[parse_feature(each.feature)[1], each.activation, each.relative] for each in active]
            assert layer["features"][position] == expected


@pytest.mark.parametrize("position", [-1, 4, -10])
def test_predictions_are_those_of_the_model(client, position):
    told = post(client, "predict", text=TEXT, position=position, interventions=STEERED)
    ids = ids_of(TEXT)
    place = position % ids.shape[1]
    plain, steered = (probabilities(way, ids[:, : place + 1]) for way in ({}, STEERED))
    assert told["position"] == place
    assert told["token"] == made()[1].decode(ids[0, place : place + 1])
    for way, expected in (("plain", plain), ("steered", steered)):
        assert [share for _, share in told[way]] == pytest.approx(expected.topk(10).values.tolist())
    largest = (steered - plain).abs().topk(10).values
    assert [abs(after - before) for _, before, after in told["changed"]] == pytest.approx(largest.tolist())


def test_perplexities_are_those_of_the_model(client):
    model, ids = made()[0], ids_of(TEXT)
    told = post(client, "perplexity", text=TEXT, interventions=STEERED, control={"interventions": CONTROL})
    assert told["tokens"] == ids.shape[1] - 1
    for way, interventions in (("plain", {}), ("steered", STEERED), ("control", CONTROL)):
        with torch.no_grad(), unsteered(model), model.steer(interventions):
            loss = model(ids, labels=ids).loss  # transformers' own mean of cross entropies
        assert told[way] == pytest.approx(loss.exp().item(), rel=1e-5)
    assert post(client, "perplexity", text=TEXT)["control"] is None


@pytest.mark.parametrize("against", ["mean", "a", None])
def test_an_explanation_is_that_of_the_library(client, against):
    model, tokenizer, atlas = made()
    told = post(client, "explain", text=TEXT, position=5, token="q", against=against, top=3)
    expected = explain(model, tokenizer, TEXT, 5, token="q", against=against, top=3, atlas=atlas)
    assert told["explanation"] == json.loads(expected.to_json())
    assert told["graph"] == expected.to_graph()


@pytest.mark.parametrize(
    ("positions", "sampling"), [("all", {}), ("prompt", {}), ("generated", {"seed": 5, "temperature": 1.5})]
)
def test_streams_are_the_texts_that_generate_gives(client, positions, sampling):
    asked = {"prompt": "we go", "max_new_tokens": 8, "positions": positions, "interventions": STEERED}
    told = events(client, **asked, control={"interventions": CONTROL}, sample=bool(sampling), **sampling)
    tokenizer = made()[1]
    assert told[-1]["done"] is True
    for name, interventions in (("plain", {}), ("steered", STEERED), ("control", CONTROL)):
        stream = [event for event in told if event.get("stream") == name]
        assert stream.pop() == {"stream": name, "end": True, "reason": "length"}
        expected = generated(interventions, positions, new=8, **sampling)
        assert [event["token_id"] for event in stream] == expected
        assert "".join(event["token"] for event in stream) == tokenizer.decode(expected, skip_special_tokens=True)
    begins = [next(at for at, event in enumerate(told) if event.get("stream") == name) for name in ("plain", "control")]
    assert max(begins) < next(at for at, event in enumerate(told) if event.get("end"))  # they grow together


def test_a_text_can_end_early(client, monkeypatch):
    first = generated({}, new=1)[0]
    monkeypatch.setattr(made()[0].generation_config, "eos_token_id", first)
    ends = [event for event in events(client, prompt="we go") if event.get("end")]
    # both texts are the plain one here, and either may end first
    expected = [{"stream": name, "end": True, "reason": "end of text"} for name in ("plain", "steered")]
    assert sorted(ends, key=lambda event: event["stream"]) == expected


@pytest.mark.parametrize("seed", range(20))
def test_pieces_join_to_the_decoded_text(seed):
    """Random bytes make whole, unfinished and impossible characters; "€" is one of three."""
    tokenizer = made()[1]
    prompt, euro = (tokenizer(text)["input_ids"] for text in ("we go", "€"))
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, 12).tolist() + euro[: 1 + seed % 3]
    pieces, told = TokenPieces(tokenizer, prompt), []
    for token in ids:
        told += pieces.add(token)
        assert not told or not told[-1][1].endswith("\ufffd")  # nothing is told that a later token could change
    told += pieces.rest()
    assert [token for token, _ in told] == ids
    assert "".join(text for _, text in told) == tokenizer.decode(ids, skip_special_tokens=True)


def test_pieces_keep_the_space_of_a_word():
    tokenizer = planted.tokenizer()  # decodes no space before the first word of a text
    pieces = TokenPieces(tokenizer, tokenizer("king")["input_ids"])
    assert [pieces.add(token)[0][1] for token in tokenizer("dog bread")["input_ids"]] == [" dog", " bread"]


def test_a_control_is_another_feature_of_the_layer_that_fires_as_often(client):
    _, _, atlas = made()
    rates = {name: atlas.row(name)["firing_rate"] for name in atlas if name.startswith("L0/")}
    median = sorted(rates, key=rates.get)[len(rates) // 2]
    found = [client.get("/api/control", params={"feature": median, "seed": seed}).json() for seed in range(40)]
    again = client.get("/api/control", params={"feature": median, "seed": 3}).json()
    assert again == found[3]
    chosen = {each["feature"] for each in found}
    assert len(chosen) > 5
    assert median not in chosen
    assert f"L0/{PRUNED}" not in chosen
    assert all(each["firing_rate"] == rates[each["feature"]] for each in found)
    others = sorted(abs(rate - rates[median]) for name, rate in rates.items() if name != median)
    assert max(abs(rates[name] - rates[median]) for name in chosen) <= 4 * others[20]

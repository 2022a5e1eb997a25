"""Hostile and mistaken requests: each gets one clear sentence, and the server goes on."""

import json

import pytest
from explored_model import PRUNED, made, site

testclient = pytest.importorskip("fastapi.testclient")

from modeling_mfn.explorer.server.app import create_app  # noqa: E402
from modeling_mfn.explorer.server.limits import Limits  # noqa: E402

JSON = {"Content-Type": "application/json"}
LIMITS = Limits(text_tokens=40, text_bytes=400, explained_tokens=20, new_tokens=10, interventions=3, body_bytes=3000)
TEXT = "a king"


@pytest.fixture(scope="module")
def client():
    app = create_app(*made(), site(), limits=LIMITS)
    with testclient.TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


def refused(client, path, content, status=422):
    """Sentence with which a request is refused."""
    body = content if isinstance(content, str | bytes) else json.dumps(content)
    answer = client.post(f"/api/{path}", content=body, headers=JSON)
    assert answer.status_code == status, answer.text
    (sentence,) = answer.json().values()
    assert len(sentence) <= 501
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    assert "pydantic" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the body is missing"),
        ("{", "the body is not JSON"),
        (b"\xff\xfe{}", None),
        ("[" * 2000, None),
        ('{"text": 1' + "0" * 2000 + "}", None),
        ("null", "the body is missing"),
        ("[]", "the body is []; it must be a valid dictionary or object to extract fields from"),
        ('"text"', None),
        ("{}", "text is missing"),
        ('{"text": 5}', "text is 5; it must be a valid string"),
        ('{"text": null}', "text is None; it must be a valid string"),
        ('{"text": "a", "k": "3"}', "k is '3'; it must be a valid integer"),
        ('{"text": "a", "k": true}', "k is True; it must be a valid integer"),
        ('{"text": "a", "k": NaN}', None),
        ('{"text": "a", "k": 0}', "k is 0; it must be greater than or equal to 1"),
        ('{"text": "a", "k": 11}', "k is 11; this server tells 10 features at most"),
        ('{"text": "a", "colour": 1}', "there is no field 'colour' in this request"),
        ('{"text": ""}', "the text has no tokens"),
        ('{"text": "\\ud800"}', "text is '\\ud800'; it must be text, in UTF-8"),
        (json.dumps({"text": "a" * 41}), "the text has 41 tokens; this server reads 40 at most"),
        (json.dumps({"text": "é" * 201}), "the text has 402 bytes; this server reads 400 at most"),
    ],
)
def test_mistakes_are_named(client, content, said):
    status = 400 if (said is None and content[:1] in (b"\xff", "[")) or (said is None and "0000" in content) else 422
    if said is None:
        answer = client.post("/api/read", content=content, headers=JSON)
        assert answer.status_code in (400, 422)
        assert set(answer.json()) == {"detail"}
    else:
        assert refused(client, "read", content, status) == said


def test_a_body_that_is_too_large_is_refused(client):
    sentence = refused(client, "read", {"text": "a" * 4000}, 413)
    assert sentence == "the body is too large; this server takes 3000 bytes at most"


@pytest.mark.parametrize("text", ["\x00\x1b[2J\x07", "\u202e\u2066", "z" + "\u0335" * 9, "\ufffd", "<s></s>", "\r\n"])
def test_strange_texts_are_texts(client, text):
    for path, body in (("read", {"text": text}), ("predict", {"text": text}), ("explain", {"text": text, "top": 1})):
        answer = client.post(f"/api/{path}", json=body)
        assert answer.status_code == 200 or answer.json()["detail"] == "the text has no tokens"
    answer = client.post("/api/generate", json={"prompt": text, "max_new_tokens": 2})
    assert answer.status_code in (200, 422)
    assert answer.text.isascii()


@pytest.mark.parametrize(
    ("interventions", "said"),
    [
        ({"L0/99": {"kind": "ablate"}}, "L0/99 does not exist; features are 0 to 79"),
        ({"L9/1": {"kind": "ablate"}}, "block 9 has no MFN layer; blocks with one are [0, 1, 2]"),
        ({f"L0/{PRUNED}": {"kind": "clamp", "value": 1}}, "pruned"),
        ({"animals": {"kind": "ablate"}}, "'animals' names no feature"),
        ({"L0/1" + "0" * 900: {"kind": "ablate"}}, "names no feature"),
        ({"L0/1": {"kind": "explode"}}, "is not an intervention"),
        ({"L0/1": {"kind": "clamp"}}, "is not an intervention"),
        ({"L0/1": {"kind": "clamp", "value": "4"}}, "value of Clamp is '4'; it must be a finite number"),
        ({"L0/1": {"kind": "clamp", "value": True}}, "value of Clamp is"),
        ({"L0/1": {"kind": "clamp", "value": None}}, "value of Clamp is"),
        ({"L0/1": {"kind": "clamp", "value": [1]}}, "value of Clamp is"),
        ({"L0/1": {"kind": "clamp", "value": float("nan")}}, "it must be a finite number"),
        ({"L0/1": {"kind": "clamp", "value": float("inf")}}, "it must be a finite number"),
        ({"L0/1": {"kind": "clamp", "value": 10**400}}, "value of Clamp is"),
        ({"L0/1": {"kind": "clamp", "value": 1e30}}, "is too large for a model in float32"),
        ({"L0/1": {"kind": "clamp", "value": 1, "when": "L2/1", "above": 0}}, "waits for a later layer"),
        ({"L0/1": {"kind": "clamp", "value": 1, "when": "L0/1", "above": -1}}, "above is -1"),
        ({"L0/1": []}, "interventions.L0/1 is []"),
        ([], "interventions is []; it must be a valid dictionary"),
        ({f"L0/{index}": {"kind": "ablate"} for index in range(4)}, "this server steers 3 features at most"),
    ],
)
def test_interventions_that_cannot_be_are_refused_everywhere(client, interventions, said):
    for path, text in (("predict", "text"), ("perplexity", "text"), ("generate", "prompt")):
        assert said in refused(client, path, {text: TEXT, "interventions": interventions})
    for path, text in (("perplexity", "text"), ("generate", "prompt")):
        sentence = refused(client, path, {text: TEXT, "control": {"interventions": interventions}})
        assert said.removeprefix("interventions") in sentence


@pytest.mark.parametrize("layer", [0, 2])
def test_values_that_make_logits_infinite_are_named(client, layer):
    """The last layer's own features reach the final norm, where a square of them must be finite."""
    huge = {f"L{layer}/1": {"kind": "clamp", "value": 1.8e19}}
    for path, text in (("predict", "text"), ("perplexity", "text")):
        answer = client.post(f"/api/{path}", json={text: TEXT, "interventions": huge})
        if answer.status_code != 200:
            assert "not finite with these interventions" in answer.json()["detail"] or "too large" in answer.text
    for sample in (False, True):
        told = client.post(
            "/api/generate", json={"prompt": TEXT, "interventions": huge, "sample": sample, "max_new_tokens": 3}
        )
        last = json.loads(told.text.splitlines()[-1])
        assert "done" in last or "not finite" in last.get("error", last.get("detail", ""))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be greater than or equal to 1"),
        ({"max_new_tokens": 11}, "max_new_tokens is 11; this server generates 10 at most"),
        ({"max_new_tokens": 10**30}, "this server generates 10 at most"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be a valid integer"),
        ({"temperature": 0}, "temperature is 0; it must be greater than or equal to 0.01"),
        ({"temperature": float("nan")}, "it must be a finite number"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a valid number"),
        ({"seed": -1}, "seed is -1; it must be greater than or equal to 0"),
        ({"seed": 2**64}, "it must be less than 9007199254740992"),
        ({"positions": "some"}, "positions is 'some'; it must be 'all', 'prompt' or 'generated'"),
        ({"control": {"interventions": {}, "seed": 1}}, "there is no field 'control.seed' in this request"),
        ({"prompt": ""}, "the prompt has no tokens"),
        ({"prompt": "a" * 41}, "the prompt has 41 tokens; this server reads 40 at most"),
    ],
)
def test_settings_of_a_generation_have_limits(client, settings, said):
    assert said in refused(client, "generate", {"prompt": TEXT} | settings)


def test_a_text_that_would_be_longer_than_the_model_reads_is_refused():
    with testclient.TestClient(create_app(*made(), site()), base_url="http://localhost") as client:
        sentence = refused(client, "generate", {"prompt": "a" * 100, "max_new_tokens": 30})
    assert sentence == (
        "the prompt has 100 tokens and max_new_tokens is 30; the model reads 128 in all: shorten the prompt or "
        "generate fewer"
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"position": 6}, "position is 6; the text has 6 tokens, counted from 0, or from -1 backwards"),
        ({"position": -7}, "position is -7"),
        ({"position": 10**30}, "position is 1000"),
        ({"token": "queen"}, "token 'queen' is 5 tokens"),
        ({"token": ""}, "token '' is 0 tokens"),
        ({"token": "\ud800"}, "it must be text, in UTF-8"),
        ({"against": "kings"}, "against 'kings' is 5 tokens"),
        ({"top": 21}, "top is 21; this server explains 20 at most"),
        ({"method": "magic"}, "method is 'magic'; it must be 'gradient' or 'integrated'"),
        ({"text": "a" * 21}, "the text has 21 tokens up to the position; this server explains 20 at most"),
    ],
)
def test_explanations_that_cannot_be_are_refused(client, asked, said):
    assert said in refused(client, "explain", {"text": TEXT} | asked)


def test_a_text_of_one_token_has_no_perplexity(client):
    assert refused(client, "perplexity", {"text": "a"}).startswith("the text has one token")


@pytest.mark.parametrize(
    ("feature", "said"),
    [
        ("L0/99", "L0/99 does not exist; layers are [0, 1, 2], features 0 to 79"),
        (f"L0/{PRUNED}", f"L0/{PRUNED} never fires in the atlas, so no feature fires equally often"),
        ("king", "'king' names no feature"),
        ("", "'' names no feature"),
    ],
)
def test_controls_of_features_that_do_not_exist_are_refused(client, feature, said):
    answer = client.get("/api/control", params={"feature": feature})
    assert answer.status_code == 422
    assert said in answer.json()["detail"]


def test_an_error_that_nobody_foresaw_tells_nothing(client, monkeypatch, caplog):
    def broken(*arguments, **settings):
        raise RuntimeError("a secret path /home/somebody")

    monkeypatch.setattr(type(made()[0]), "forward", broken)
    monkeypatch.setattr("modeling_mfn.explorer.server.readings.explain", broken)
    asked = [("read", {"text": TEXT}), ("explain", {"text": TEXT}), ("generate", {"prompt": TEXT})]
    for path, body in asked:
        answer = client.post(f"/api/{path}", json=body)
        (last,) = json.loads(answer.text.splitlines()[-1]).values()
        assert last == "the server failed on this request; the terminal of mfn explore has the reason"
        assert answer.status_code == 200 if path == "generate" else 500
        assert "content-security-policy" in answer.headers
    assert "a secret path" in caplog.text
    monkeypatch.undo()
    assert client.post("/api/read", json={"text": TEXT}).status_code == 200  # its places are free again


@pytest.mark.parametrize("path", ["/api/", "/api/nothing", "/api/read/", "/openapi.json", "/docs", "/api/labels"])
@pytest.mark.parametrize("method", ["GET", "POST", "PATCH"])
def test_other_addresses_do_not_exist(client, path, method):
    if (path, method) != ("/api/labels", "GET"):
        answer = client.request(method, path)
        assert answer.status_code in (404, 405)
        assert set(answer.json()) == {"detail"}

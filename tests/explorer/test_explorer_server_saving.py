"""Presets and labels that people save in the explorer."""

import json

import pytest
from explored_model import ACTIVE, OTHER, PRUNED, made, save, site
from transformers import AutoTokenizer

from modeling_mfn import FeatureAtlas, MFNConfig, MFNForCausalLM

testclient = pytest.importorskip("fastapi.testclient")

from modeling_mfn.explorer.server.app import create_app  # noqa: E402

CALM = {
    "interventions": {"L0/4": {"kind": "scale", "factor": 0.5, "when": "L0/2", "above": 0.5}},
    "positions": "prompt",
}


@pytest.fixture
def folder(tmp_path):
    save(tmp_path)
    return tmp_path


@pytest.fixture
def client(folder):
    parts = MFNForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    app = create_app(*parts, FeatureAtlas.from_pretrained(folder), site(), folder=folder)
    with testclient.TestClient(app, base_url="http://localhost") as client:
        yield client


def test_presets_are_saved_in_the_folder_and_the_active_one_stays_active(client, folder):
    assert client.get("/api/session").json()["writable"] is True
    before = json.loads((folder / "config.json").read_text())
    assert client.get("/api/presets").json() == before["steering_presets"]
    assert client.put("/api/presets/ka/lm é", json=CALM).json() == CALM
    assert client.get("/api/presets").json()["ka/lm é"] == CALM
    after = json.loads((folder / "config.json").read_text())
    assert after.pop("steering_presets") == before.pop("steering_presets") | {"ka/lm é": CALM}
    assert after == before  # active_preset, dtype and all else
    loaded = MFNForCausalLM.from_pretrained(folder)
    assert loaded.config.active_preset == ACTIVE
    loaded.steer("ka/lm é")


def test_a_preset_is_replaced_also_the_active_one(client, folder):
    assert client.put(f"/api/presets/{ACTIVE}", json=CALM).status_code == 200
    config = MFNConfig.from_pretrained(folder)
    assert (config.steering_presets[ACTIVE], config.active_preset) == (CALM, ACTIVE)


def test_a_preset_that_another_program_saved_meanwhile_is_kept(client, folder):
    model = MFNForCausalLM.from_pretrained(folder)
    model.save_preset("theirs", {"L1/1": {"kind": "ablate"}})
    (folder / "config.json").write_text(model.config.to_json_string())
    assert client.put("/api/presets/ours", json=CALM).status_code == 200
    assert {"theirs", "ours", ACTIVE, OTHER} == set(MFNConfig.from_pretrained(folder).steering_presets)
    assert "theirs" in client.get("/api/presets").json()


def test_presets_are_deleted_but_not_the_active_one(client, folder):
    assert client.delete(f"/api/presets/{OTHER}").json() == {"deleted": OTHER}
    assert set(MFNConfig.from_pretrained(folder).steering_presets) == {ACTIVE}
    assert client.delete(f"/api/presets/{OTHER}").status_code == 404
    answer = client.delete(f"/api/presets/{ACTIVE}")
    assert answer.status_code == 422
    assert answer.json()["detail"] == (
        f"'{ACTIVE}' is the preset that is active by default; choose another with mfn steer --active"
    )
    assert MFNConfig.from_pretrained(folder).active_preset == ACTIVE


@pytest.mark.parametrize(
    ("name", "interventions", "said"),
    [
        ("x", {f"L0/{PRUNED}": {"kind": "clamp", "value": 1.0}}, "pruned"),
        ("x", {"L0/99": {"kind": "ablate"}}, "does not exist"),
        ("%0A", {"L0/1": {"kind": "ablate"}}, "is not a name for a preset"),
        ("%20", {"L0/1": {"kind": "ablate"}}, "is not a name for a preset"),
        ("x" * 101, {"L0/1": {"kind": "ablate"}}, "has 101 characters"),
        ("%ED%A0%80", {"L0/1": {"kind": "ablate"}}, None),  # bytes of a lone surrogate
    ],
)
def test_a_preset_that_cannot_be_is_refused_and_changes_nothing(client, folder, name, interventions, said):
    before = (folder / "config.json").read_text()
    answer = client.put(f"/api/presets/{name}", json={"interventions": interventions})
    if said is None and answer.status_code == 200:  # replaced by U+FFFD on the way
        return
    assert answer.status_code == 422
    assert said is None or said in answer.json()["detail"]
    assert (folder / "config.json").read_text() == before
    assert set(client.get("/api/presets").json()) == {ACTIVE, OTHER}


def test_labels_are_saved_with_the_atlas_at_once(client, folder):
    hostile = "<script>alert(1)</script> é\u202e"
    record = client.put("/api/labels/0/12", json={"label": hostile}).json()
    assert record == {"feature": "L0/12", "label": hostile, "source": "human", "score": None}
    atlas = FeatureAtlas.from_pretrained(folder)
    assert atlas["L0/12"].label == hostile
    atlas.label("L0/13", "theirs", source="imported")  # another program
    atlas.save_pretrained(folder)
    client.put("/api/labels/1/2", json={"label": "second"})
    assert {label.feature for label in FeatureAtlas.from_pretrained(folder).labels} == {"L0/12", "L0/13", "L1/2"}
    assert set(client.get("/api/labels").json()) == {"L0/12", "L1/2"}
    assert client.delete("/api/labels/0/12").json() is None
    assert client.get("/api/labels").json()["L0/12"] is None  # the pages' data still has it
    assert client.delete("/api/labels/0/12").status_code == 404
    assert FeatureAtlas.from_pretrained(folder)["L0/12"].label is None


@pytest.mark.parametrize("place", ["9/1", "0/80", "0/-1", "0/1e3", "x/1", f"0/{10**30}"])
def test_labels_of_features_that_do_not_exist_are_refused(client, place):
    for answer in (client.put(f"/api/labels/{place}", json={"label": "x"}), client.delete(f"/api/labels/{place}")):
        assert answer.status_code in (404, 422)
        assert set(answer.json()) == {"detail"}


@pytest.mark.parametrize("label", ["", "   ", "x" * 501, "\ud800", 5, None])
def test_texts_that_cannot_be_labels_are_refused(client, folder, label):
    answer = client.put(
        "/api/labels/0/1", content=json.dumps({"label": label}), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422
    assert not len(FeatureAtlas.from_pretrained(folder).labels)


def test_nobody_saves_where_nothing_may_be_saved():
    with testclient.TestClient(create_app(*made(), site()), base_url="http://localhost") as client:
        answers = [
            client.put("/api/presets/x", json=CALM),
            client.delete(f"/api/presets/{OTHER}"),
            client.put("/api/labels/0/1", json={"label": "x"}),
            client.delete("/api/labels/0/1"),
        ]
        assert [answer.status_code for answer in answers] == [403] * 4
        assert set(client.get("/api/presets").json()) == {ACTIVE, OTHER}
        assert client.get("/api/labels").json() == {}


def test_a_folder_that_cannot_be_written_is_told_and_nothing_changes(client, folder, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr("modeling_mfn.explorer.server.saved.write_whole", full)
    monkeypatch.setattr("modeling_mfn.features.atlas.storage.write_whole", full)
    for answer in (client.put("/api/presets/x", json=CALM), client.put("/api/labels/0/1", json={"label": "x"})):
        assert (answer.status_code, answer.json()) == (
            507,
            {"detail": "the model's folder cannot be written: No space left on device"},
        )
    assert set(client.get("/api/presets").json()) == {ACTIVE, OTHER}
    assert client.get("/api/labels").json() == {}

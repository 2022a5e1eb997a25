"""The static explorer on a local Hub: next to its model, as a Space, and of a repository without its weights."""

import base64
import gzip
import json
import shutil

import pytest
from huggingface_hub import ModelCard
from test_push import clients, folder, hub, mfn  # noqa: F401  # fixtures

from modeling_mfn.explorer.site_data.write import write_site
from modeling_mfn.features.atlas import FeatureAtlas


@pytest.fixture
def trained(folder):  # noqa: F811
    """The folder, with a state of the Trainer that names a place on this machine."""
    history = [{"step": step, "loss": 1 / step, "note": "secret"} for step in (1, 2)]
    state = {"best_model_checkpoint": "/home/me/secret", "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


@pytest.fixture
def site(trained, tmp_path):
    """The explorer as a call of Python writes it."""
    site = tmp_path / "expected"
    site.mkdir()
    write_site(FeatureAtlas.from_pretrained(trained), trained, site, name="me/trained")
    return {path.relative_to(site).as_posix(): path.read_bytes() for path in site.rglob("*") if path.is_file()}


def unpacked(site, name):
    text = (site / "data" / f"{name}.js").read_text()
    return json.loads(gzip.decompress(base64.b64decode(text.split('"')[3])))


def test_the_explorer_goes_next_to_the_model_or_into_a_space(clients, hub, trained, site, tmp_path):  # noqa: F811
    def pushed(repository, prefix=""):
        there = {path: content for path, content in hub.files(repository).items() if path.startswith(prefix)}
        return {path.removeprefix(prefix): content for path, content in there.items()}

    printed = clients.run(mfn, "push", trained, "me/trained", "--with-explorer")
    assert "earlier push" not in printed
    assert unpacked(tmp_path / "expected", "model")["training"]["curves"] == {"loss": [[1, 1.0], [2, 0.5]]}
    assert "secret" not in json.dumps(unpacked(tmp_path / "expected", "model"))
    assert pushed("me/trained", "explorer/") == site
    card = ModelCard(hub.files("me/trained")["README.md"].decode()).text
    assert 'hf download me/trained --include "explorer/*" --local-dir .' in card
    # what an earlier explorer had goes
    repository = hub.repositories["me/trained"]
    repository.commit("main", hub.files("me/trained") | {"explorer/data/index/9.js": b"old"}, "older")
    clients.run(mfn, "push", trained, "me/trained", "--with-explorer")
    assert pushed("me/trained", "explorer/") == site
    printed = clients.run(mfn, "push", trained, "me/trained")
    assert "explorer/ of me/trained is of an earlier push; --with-explorer replaces it" in " ".join(printed.split())
    assert pushed("me/trained", "explorer/") == site

    hub.requests.clear()
    clients.run(mfn, "explore", "me/trained", "--static", tmp_path / "static")
    wanted = {"config.json", "training_record.json", *(f"features/{name}" for name in ("atlas.json", "labels.json"))}
    assert set(hub.downloads()) == wanted | {"features/features.parquet", "features/examples.parquet"}
    assert unpacked(tmp_path / "static", "model")["training"]["curves"] == {}
    about = (tmp_path / "static" / "data" / "site.js").read_bytes()
    assert about == site["data/site.js"]
    hub.add("me/bare", {name: text for name, text in hub.files("me/trained").items() if "features/" not in name})
    printed = clients.run(mfn, "explore", "me/bare", "--static", tmp_path / "bare", code=2)
    assert "mfn explore me/bare --atlas FOLDER" in " ".join(printed.split())

    (trained / "README.md").unlink()
    printed = clients.run(mfn, "push", trained, "me/another", "--explorer-space", "me/space", "--private")
    assert "earlier push" not in printed
    assert f"{hub.endpoint}/spaces/me/space" in printed
    assert hub.repositories["spaces/me/space"].private
    assert not pushed("me/another", "explorer/")
    there = pushed("spaces/me/space")
    settings = ModelCard(there.pop("README.md").decode()).data.to_dict()
    assert (settings["sdk"], settings["app_file"], settings["models"]) == ("static", "index.html", ["me/another"])
    del there[".gitattributes"]
    assert set(there) == set(site)
    assert f"({hub.endpoint}/spaces/me/space)" in hub.files("me/another")["README.md"].decode()
    space = hub.repositories["spaces/me/space"]
    mine = {"README.md": b"---\nsdk: static\n---\nmine\n", "data/features/L9/0.js": b"old"}
    space.commit("main", hub.files("spaces/me/space") | mine, "mine")
    clients.run(mfn, "push", trained, "me/another", "--explorer-space", "me/space")
    assert hub.files("spaces/me/space")["README.md"] == mine["README.md"]
    assert "data/features/L9/0.js" not in hub.files("spaces/me/space")


def test_what_is_not_shared(clients, hub, trained):  # noqa: F811
    hub.add("spaces/me/app", {"app.py": b""})
    printed = clients.run(mfn, "push", trained, "me/trained", "--explorer-space", "me/app", code=2)
    assert "the Space me/app holds app.py, which is not of an explorer" in " ".join(printed.split())
    assert set(hub.files("spaces/me/app")) == {"app.py"}
    shutil.rmtree(trained / "features")
    hub.reset()
    printed = clients.run(mfn, "push", trained, "me/trained", "--with-explorer", code=2)
    assert f"this makes one: mfn atlas {trained} --text TEXT" in " ".join(printed.split())
    assert hub.repositories == {}

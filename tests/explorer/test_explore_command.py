"""`mfn explore` as a user runs it: the static folder, and errors that say what to do."""

import json
import shutil

import pytest
from atlas_data import word_tokenizer
from command_line import run
from conftest import make_base, make_mfn
from features_folder import label, write_features
from unpacked import plain, unpacked

from modeling_mfn.explorer.server import app as server
from modeling_mfn.explorer.site_data import write as site_module


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_mfn(make_base("llama-tied"), layers=[0, 2]).save_pretrained(folder)
    write_features(folder, [label("L2/7", "royalty"), label("L0/3", "<b>weather</b>", "human", None)])
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_static_folder_is_written_whole_and_replaced_only_if_it_is_ours(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert run("explore", folder, "--static", out) == 0
    assert str(out / "index.html") in capsys.readouterr().out.replace("\n", "")
    assert (plain(out)["name"], plain(out)["labelled"], plain(out)["live"]) == ("model", 2, False)
    assert unpacked(out, "features/L0/0")[3]["labels"][0]["label"] == "<b>weather</b>"
    parameters = dict(map(tuple, unpacked(out, "model")["facts"]))["parameters"]
    model = make_mfn(make_base("llama-tied"), layers=[0, 2])
    assert parameters == sum(weight.numel() for weight in model.parameters())  # tied weights are stored once
    first = files(out)
    assert run("explore", folder, "--static", out) == 2
    assert "is not empty; choose another folder, or --overwrite" in capsys.readouterr().err.replace("\n", " ")

    write = site_module.write_packed

    def fails_at_the_list(site, name, text):
        if name.startswith("index"):
            raise OSError("disk is full")
        write(site, name, text)

    monkeypatch.setattr(site_module, "write_packed", fails_at_the_list)
    assert run("explore", folder, "--static", out, "--overwrite") == 2
    assert run("explore", folder, "--static", tmp_path / "new") == 2
    monkeypatch.undo()
    assert files(out) == first
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}

    (out / "data" / "index" / "old.js").write_text("mine")
    capsys.readouterr()
    assert run("explore", folder, "--static", out, "--overwrite") == 2
    assert "holds data/index/old.js, which mfn did not write" in " ".join(capsys.readouterr().err.split())
    (out / "data" / "index" / "old.js").unlink()
    (tmp_path / "out.unfinished").mkdir()  # as a killed command leaves it
    for name in ("mfn_explorer.json", "data/site.js"):
        (tmp_path / "out.unfinished" / name).parent.mkdir(exist_ok=True)
        shutil.copy(out / name, tmp_path / "out.unfinished" / name)
    assert run("explore", folder, "--static", out, "--overwrite") == 0
    assert files(out) == first
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_errors_say_what_to_do(folder, tmp_path, capsys):
    out = tmp_path / "out"

    def refused(*arguments):
        assert run("explore", *arguments, "--static", out) == 2
        assert not out.exists()
        lines = capsys.readouterr().err
        return " ".join(lines.split())

    (folder / "features").rename(tmp_path / "atlas")
    assert f"has no atlas of its features; this makes one: mfn atlas {folder} --text TEXT" in refused(folder)
    assert "has no features/atlas.json" in refused(folder, "--atlas", folder)
    assert "is not a folder; give one that mfn evaluate wrote" in refused(
        folder, "--atlas", tmp_path / "atlas", "--evaluation", tmp_path / "nothing"
    )
    metadata = json.loads((tmp_path / "atlas" / "atlas.json").read_text())
    metadata["model"]["features_digest"] = "of others"
    (tmp_path / "atlas" / "atlas.json").write_text(json.dumps(metadata))
    assert "with the features of others" in refused(folder, "--atlas", tmp_path / "atlas")
    (tmp_path / "atlas" / "atlas.json").write_text("{")
    assert "atlas.json cannot be read" in refused(folder, "--atlas", tmp_path / "atlas")
    del metadata["model"]["features_digest"]
    (tmp_path / "atlas" / "atlas.json").write_text(json.dumps(metadata))
    make_base("llama-tied").save_pretrained(tmp_path / "base")
    assert "is a 'llama' model without MFN layers" in refused(tmp_path / "base")
    assert "no-folder" in refused("./no-folder")
    assert run("explore", folder, "--static", folder, "--atlas", tmp_path / "atlas", "--overwrite") == 2
    assert "is the model itself" in " ".join(capsys.readouterr().err.split())


def test_without_static_the_server_gets_the_model_and_the_same_folder(folder, tmp_path, monkeypatch):
    """`folder`, where labels are saved, is the model's own, and only if the atlas is there, too."""
    calls = []

    def run_explorer(model, tokenizer, atlas, site, **options):
        calls.append(options)
        assert model.config.layers == atlas.metadata["model"]["layers"] == [0, 2]
        assert tokenizer("w5")["input_ids"] == [5]
        assert (plain(site)["live"], plain(site)["name"]) == (True, "model")
        assert (site / "index.html").is_file()

    monkeypatch.setattr(server, "run_explorer", run_explorer)
    word_tokenizer().save_pretrained(folder)
    assert run("explore", folder, "--no-open", "--port", 8123) == 0
    shutil.move(folder / "features", tmp_path / "atlas")
    assert run("explore", folder, "--atlas", tmp_path / "atlas", "--host", "0.0.0.0") == 0
    assert calls == [
        {"folder": folder, "host": "localhost", "port": 8123, "open_browser": False},
        {"folder": None, "host": "0.0.0.0", "port": 8000, "open_browser": True},
    ]

"""`mfn export`, and `mfn convert --saes`."""

import json
import shutil

import pytest
import torch
from command_line import run
from conftest import make_base, make_mfn, tokens
from test_cli import folder  # noqa: F401
from transformers import AutoModelForCausalLM

from modeling_mfn import MFNForCausalLM
from modeling_mfn.hub.card import model_card


@pytest.fixture
def saved(folder):  # noqa: F811
    """An MFN model of layers 0 and 2 that codes streams, in a folder with its tokenizer."""
    shutil.copytree(folder / "base", folder / "mfn")
    model = make_mfn(make_base("llama-tied"), layers=[0, 2], num_features=64)
    model.save_pretrained(folder / "mfn")
    return folder, model


def test_a_model_goes_out_as_saes_and_comes_back(saved, capsys):
    folder, model = saved  # noqa: F811
    assert run("export", folder / "mfn", folder / "saes", "--format", "saelens") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 SAEs for saelens, in blocks.0.hook_resid_mid, blocks.2.hook_resid_mid" in printed
    assert run("convert", folder / "base", folder / "again", "--saes", folder / "saes", "--alpha", 1) == 0
    again = MFNForCausalLM.from_pretrained(folder / "again")
    assert torch.equal(again(**tokens(2, 9)).logits, model(**tokens(2, 9)).logits)
    assert (again.config.layers, again.config.k) == ([0, 2], 8)
    one = ("--saes", folder / "saes", "--layers", "2", "--blend-into", "mlp", "--overwrite")
    assert run("convert", folder / "base", folder / "again", *one) == 0
    config = AutoModelForCausalLM.from_pretrained(folder / "again").config
    assert (config.layers, config.blend_into, config.alpha) == ([2], "mlp", 0.0)


def test_an_export_replaces_only_an_export(saved, capsys):
    folder, _ = saved  # noqa: F811
    export = ("export", folder / "mfn", folder / "saes", "--layers", "2")
    for format in ("saelens", "saelens"):
        assert run(*export, "--format", format, "--overwrite") == 0
    assert [place.name for place in (folder / "saes").iterdir()] == ["blocks.2.hook_resid_mid"]
    file = folder / "saes" / "blocks.2.hook_resid_mid" / "cfg.json"
    theirs = json.loads(file.read_text())
    file.write_text(json.dumps(theirs | {"metadata": {"hook_name": "blocks.2.hook_resid_mid"}}))
    assert run(*export, "--overwrite") == 2
    assert "no file in" in capsys.readouterr().err


def test_saes_of_another_site_need_a_word_and_leave_a_warning(saved, capsys):
    folder, _ = saved  # noqa: F811
    assert run("export", folder / "mfn", folder / "saes") == 0
    for layer in (0, 2):
        file = folder / "saes" / f"blocks.{layer}.hook_resid_mid" / "cfg.json"
        config = json.loads(file.read_text())
        config["metadata"]["hook_name"] = f"blocks.{layer}.hook_resid_post"
        file.write_text(json.dumps(config))
    convert = ("convert", folder / "base", folder / "again", "--saes", folder / "saes")
    capsys.readouterr()
    assert run(*convert) == 2
    assert "was trained at 'blocks.0.hook_resid_post', and the MFN layer of block 0 stands" in capsys.readouterr().err
    assert not (folder / "again").exists()
    assert run(*convert, "--allow-other-site") == 0
    assert "Trained at another place" in str(model_card(folder / "again"))
    assert "Trained at another place" not in str(model_card(folder / "mfn"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "mfn", "out", "--format", "sparsify"], "input_norm is 'layer', and sparsify's SAEs read the"),
        (["export", "mfn", "out", "--layers", "0,1"], "block 1 has no MFN layer; blocks with one are [0, 2]"),
        (["export", "mfn", "out", "--layers", "two"], "layers is 'two'; write \"all\" or block indices"),
        (["export", "base", "out"], "is a 'llama' model without MFN layers"),
        (["convert", "base", "out", "--saes", "nowhere"], "nowhere is not a folder; give one with SAEs in it"),
        (
            ["convert", "base", "out", "--saes", "saes", "--layers", "1"],
            "saes has no SAE of block 1; it has those of [0, 2]",
        ),
        (
            ["convert", "base", "out", "--saes", "saes", "--codes", "update"],
            "codes is 'update', and with these SAEs it is",
        ),
        (["convert", "base", "out", "--saes", "saes", "--k", "9"], "k is 9, and with these SAEs it is 8; leave it out"),
        (["convert", "base", "out", "--saes", "saes", "--calibrate-on", "text.txt"], "SAEs are trained already"),
        (
            ["convert", "base", "out", "--allow-other-site"],
            "--allow-other-site is for --saes; without them, MFN layers",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_ends_with_one_line(saved, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(saved[0])
    assert run("export", "mfn", "saes") == 0
    capsys.readouterr()
    assert run(*arguments) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert message in printed
    assert not (saved[0] / "out").exists()

"""The verb `mfn unwrap`: a plain checkpoint, and the loss that it has."""

import json
import math

import pytest
import torch
from command_line import run
from conftest import make_base, make_mfn
from test_cli import folder  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


@pytest.fixture
def mfn(folder):  # noqa: F811
    """Folder of an MFN model at alpha 0.7, with the tokenizer of the base and a text next to it."""
    model = make_mfn(make_base("llama-tied"), alpha=0.7)
    model.save_pretrained(folder / "mfn")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "mfn")
    return folder / "mfn"


def by_hand(model, ids):
    """Perplexity of rows of tokens, of torch's own loss."""
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
    return math.exp(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))


def test_the_plain_model_and_the_loss_that_it_has(mfn, capsys):
    plain, text = mfn.parent / "plain", mfn.parent / "text.txt"
    assert run("unwrap", mfn, plain, "--text", text, "--tokens", 640, "--window", 64) == 0
    printed = " ".join(capsys.readouterr().out.split())
    model, with_features = (AutoModelForCausalLM.from_pretrained(each) for each in (plain, mfn))
    assert type(model) is LlamaForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(plain)
    ids = tokenizer(text.read_text(), return_tensors="pt")["input_ids"][:, :640].view(10, 64)
    record = json.loads((plain / "unwrapped.json").read_text())
    assert record["weights_digest"] == with_features.config.weights_digest
    (row,) = record["perplexity"]
    assert row["mfn"] == pytest.approx(by_hand(with_features, ids), abs=1e-3)
    assert row["plain"] == pytest.approx(by_hand(model, ids), abs=1e-3)
    assert row["mfn"] != row["plain"]
    assert "its logits equal the MFN model's at alpha 0 bit for bit" in printed
    assert (
        f"text.txt, 10 windows of 64 tokens: {row['mfn']:g} with MFN layers at alpha 0.7, {row['plain']:g}" in printed
    )
    with_features.set_blend(0.0)
    assert torch.equal(model(ids).logits, with_features(ids).logits)


def test_without_text_it_says_that_nothing_was_measured(mfn, capsys):
    plain = mfn.parent / "plain"
    for option in ("--tokens", "--window"):
        assert run("unwrap", mfn, plain, option, 64) == 2
        assert f"{option} is for --text; without a text, nothing is measured" in capsys.readouterr().err
    assert not plain.exists()
    assert run("unwrap", mfn, plain) == 0
    assert "was not measured; --text measures it" in " ".join(capsys.readouterr().out.split())
    assert json.loads((plain / "unwrapped.json").read_text())["perplexity"] == []
    assert run("unwrap", mfn, plain) == 2
    assert run("unwrap", mfn, plain, "--overwrite") == 0
    assert run("unwrap", mfn.parent / "base", mfn.parent / "other") == 2
    assert "without MFN layers" in capsys.readouterr().err
    assert not (mfn.parent / "other").exists()

"""`mfn train` and the calibration of `mfn convert`: precision and positions."""

import json

import pytest
import torch
from command_line import run
from conftest import make_base
from test_cli import converted, folder  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_mfn import MFNForCausalLM, MFNTrainingArguments
from modeling_mfn.data.text import load_text, pack

SHORT = ("--steps", 30, "--window", 16, "--batch-size", 4, "--learning-rate", 1e-4)


def trained(folder, source, name, *options):  # noqa: F811
    assert run("train", source, folder / name, "--text", folder / "text.txt", *SHORT, *options) == 0
    return AutoModelForCausalLM.from_pretrained(folder / name).state_dict()


def test_a_bf16_checkpoint_is_trained_in_float32(folder):  # noqa: F811
    """Weights equal those of a training of the float32 copy, bit for bit. Options for bfloat16 are covered, too."""
    half = converted(folder, "--dtype", "bfloat16", "--calibrate-on", folder / "text.txt")
    model = AutoModelForCausalLM.from_pretrained(half)
    assert model.dtype == torch.bfloat16
    model.float().save_pretrained(folder / "whole")
    AutoTokenizer.from_pretrained(half).save_pretrained(folder / "whole")
    expected = trained(folder, folder / "whole", "expected")
    for name, weight in trained(folder, half, "ours").items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, expected[name]), name
    for name, weight in trained(folder, half, "rounded", "--dtype", "bfloat16").items():
        assert torch.equal(weight, expected[name].bfloat16()), name
    start, fast = model.state_dict(), trained(folder, half, "fast", "--bf16")
    name = "model.backbone.layers.1.mfn.encoder.weight"
    assert fast[name].dtype == torch.float32
    assert 0 < (fast[name] - expected[name]).norm() < 0.5 * (expected[name] - start[name]).norm()
    assert (fast[name].bfloat16() != fast[name]).float().mean() > 0.9  # the weights themselves are not rounded


@pytest.mark.parametrize("family", ["llama-tied", "gpt2-tied"])
def test_calibration_reads_no_farther_than_the_model_s_positions(folder, family):  # noqa: F811
    """The models read 64 positions, so that calibration uses rows of 64 tokens instead of 128."""
    base, tokenizer = make_base(family), AutoTokenizer.from_pretrained(folder / "base")
    base.save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(converted(folder, "--calibrate-on", folder / "text.txt"))
    rows = pack(load_text([folder / "text.txt"]), tokenizer, 64)
    calibration = {"input_ids": torch.tensor(rows[:16]["input_ids"])}
    expected = MFNForCausalLM.from_base(base, num_features=64, k=8, calibration=calibration)
    for layer, ours in model.mfn_layers.items():
        torch.testing.assert_close(ours.decoder.bias, expected.mfn_layers[layer].decoder.bias)


def test_the_stability_loss_of_the_command_line(folder):  # noqa: F811
    source, expected = converted(folder, "--calibrate-on", folder / "text.txt"), {}
    for where in ("layer", "model"):
        trained(folder, source, where, "--lambda-stab", 2.5, "--stability-pass", where)
        record = json.loads((folder / where / "training_record.json").read_text())
        assert (record["arguments"]["stability_pass"], record["arguments"]["lambda_stab"]) == (where, 2.5)
        expected[where] = record["figures"]["stab_loss"]
    # 10 % of noise on the embeddings reaches the second layer through a block
    assert expected["layer"] != expected["model"]


@pytest.mark.parametrize("steps", [1, 8])
def test_a_training_that_diverges_ends_with_one_line(folder, capsys, steps):  # noqa: F811
    line = ("train", converted(folder), folder / "out", "--text", folder / "text.txt", *SHORT)
    capsys.readouterr()
    assert run(*line, "--steps", steps, "--learning-rate", 1e30, "--save-steps", 1) == 2
    error = capsys.readouterr().err
    assert [each for each in error.splitlines() if each.startswith("mfn: ")] == [error.splitlines()[-1]]
    assert "not finite" in error
    assert not list((folder / "out").glob("**/*.safetensors"))


@pytest.mark.parametrize("weight", ["lm_head.weight", "model.backbone.layers.1.mfn.encoder.bias"])
def test_no_verb_takes_a_model_whose_weights_are_not_finite(folder, capsys, weight):  # noqa: F811
    source, text = converted(folder), ("--text", folder / "text.txt")
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.get_parameter(weight).view(-1)[7] = torch.nan
    model.save_pretrained(source)
    for verb in (
        ("train", source, folder / "out", *text, *SHORT),
        ("atlas", source, *text, "--window", 16),
        ("steer", source, "w5 w6", "--set", "L0/5=ablate"),
        ("explain", source, "w5 w6"),
        ("evaluate", source, "--output", folder / "results", *text, "--window", 16),
        ("convert", folder / "damaged", folder / "out", "--num-features", 64),
    ):
        if verb[0] == "convert":
            base = AutoModelForCausalLM.from_pretrained(folder / "base")
            with torch.no_grad():
                base.lm_head.weight[3, 7] = torch.inf
            base.save_pretrained(folder / "damaged")
            AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "damaged")
        capsys.readouterr()
        assert run(*verb) == 2, verb
        assert "is not finite" in " ".join(capsys.readouterr().err.split())
    assert not (folder / "out").exists()


def test_the_options_are_those_of_the_dataclass(folder, capsys, monkeypatch):  # noqa: F811
    """Options have the names and defaults of MFNTrainingArguments and may stand anywhere on the line.

    A bad value gives one line of error.
    """
    source, own = converted(folder), MFNTrainingArguments.__annotations__
    trained(folder, source, "usual", "--steps", 2)
    record = json.loads((folder / "usual" / "training_record.json").read_text())["arguments"]
    defaults = MFNTrainingArguments(output_dir=str(folder / "unused")).to_dict()
    assert {name: record[name] for name in own} == {name: defaults[name] for name in own}

    given = {
        "--alpha-shape": "cosine",
        "--rho": 0.25,
        "--trainable-features": "L0/3,L2/7",
        "--k-start": 9,
        "--k-end": 4,
    }
    line = [
        "train",
        *(word for pair in given.items() for word in pair),
        "--no-normalize-losses",
        "--log-layers",
        source,
    ]
    assert run(*line, folder / "chosen", "--text", folder / "text.txt", *SHORT, "--steps", 2) == 0
    record = json.loads((folder / "chosen" / "training_record.json").read_text())["arguments"]
    changed = {name: record[name] for name in own if record[name] != defaults[name]}
    assert changed == {
        "alpha_shape": "cosine", "rho": 0.25, "trainable_features": {"0": [3], "2": [7]}, "k_start": 9, "k_end": 4,
        "normalize_losses": False, "log_layers": True,
    }  # fmt: skip

    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "160")
    assert run("train", "--help") == 0
    help_text = " ".join(capsys.readouterr().out.split())
    assert all(f"--{name.replace('_', '-')} " in help_text for name in own)
    assert run("train", source, folder / "bad", "--text", folder / "text.txt", "--lambda-recon", -3) == 2
    assert capsys.readouterr().err == "mfn: lambda_recon is -3.0; it must be a finite number of at least 0\n"
    assert run("train", source, folder / "bad", "--text", folder / "text.txt", "--alpha-shape", "square") == 2
    assert not (folder / "bad").exists()

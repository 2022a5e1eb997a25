"""Tests of the examples and the demo, on a tiny model."""

import importlib.util
import io
import json
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_base
from huggingface_hub import ModelCard
from rich.console import Console
from tokenizers_for_tests import VERSE, make_tokenizer, train_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_mfn import FeatureAtlas, MFNForCausalLM
from modeling_mfn.data import text as data
from modeling_mfn.demo import assets as demo_assets
from modeling_mfn.demo import run as demo

EXAMPLES = Path(__file__).parent.parent / "examples"
TRL = [pytest.mark.trl, pytest.mark.filterwarnings("ignore::FutureWarning")]  # its own


@pytest.fixture
def train_mfn(tmp_path, monkeypatch):
    """Returns a function that runs the training script on a tiny base and text.

    Its arguments come from a file or from the command line.
    """
    make_base("llama-tied").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("a line, and another line.\n" * 40)
    usual = {"model": str(tmp_path / "base"), "text": [str(tmp_path / "text.txt")], "layers": "1", "k": 4, "window": 16}
    usual |= {"held_out_rows": 4, "max_steps": 3, "learning_rate": 2e-3, "use_cpu": True, "disable_tqdm": True}

    def run(out, from_file=False, **settings):
        given = usual | {"output_dir": str(tmp_path / out)} | settings
        if from_file:
            (tmp_path / "arguments.json").write_text(json.dumps(given))
            line = [str(tmp_path / "arguments.json")]
        else:
            lists = {name: value if isinstance(value, list) else [str(value)] for name, value in given.items()}
            line = [word for name, words in lists.items() for word in (f"--{name}", *words)]
        monkeypatch.setattr("sys.argv", ["train_mfn.py", *line])
        spec = importlib.util.spec_from_file_location("train_mfn", EXAMPLES / "train_mfn.py")
        script = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "train_mfn", script)  # dataclasses look their module up
        spec.loader.exec_module(script)
        script.main()
        return tmp_path / out

    return run


def measured(out):
    return json.loads((out / "eval_results.json").read_text())


@pytest.mark.parametrize(("large", "from_file"), [(100, False), (2**27, True)], ids=["streamed", "in memory"])
def test_the_training_script(train_mfn, monkeypatch, large, from_file):
    """The script's defaults hold for both sources of arguments. Streamed text trains, too.

    A base in bfloat16 is trained in float32.
    """
    monkeypatch.setattr(data, "STREAM_ABOVE", large)
    out = train_mfn("out", from_file, bf16=True)
    record = json.loads((out / "training_record.json").read_text())
    assert (record["steps"], record["tokens"]) == (3, 3 * 2 * 16)
    assert record["arguments"]["learning_rate"] == 2e-3
    assert record["arguments"]["per_device_train_batch_size"] == 2
    assert "eval_recon_loss" in measured(out)
    model = MFNForCausalLM.from_pretrained(out)
    assert (model.config.layers, model.dtype) == ([1], torch.float32)


def test_the_training_script_measures_alone_and_goes_on_from_where_it_is_told(train_mfn, tmp_path):
    """Perplexity is that of transformers' own loss on the held-out rows. A resumed run ends with the same weights."""
    trained = train_mfn("trained", save_steps=2, max_steps=4)
    weights = (trained / "model.safetensors").read_bytes()
    alone = train_mfn("alone", model=str(trained), do_train=False)
    assert {path.name for path in alone.iterdir()} == {"all_results.json", "eval_results.json"}
    rows = data.pack(data.load_text([tmp_path / "text.txt"]), make_tokenizer(), 16)
    ids = torch.tensor(rows[:4]["input_ids"])
    with torch.no_grad():
        loss = MFNForCausalLM.from_pretrained(trained)(input_ids=ids, labels=ids).loss
    for out in (trained, alone):
        assert measured(out)["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)
    distilled = train_mfn("distilled", model=str(trained), do_train=False, util_target="kl", trainable="mfn")
    assert "eval_util_loss" in measured(distilled)
    assert "perplexity" not in measured(distilled)

    told = train_mfn("told", resume_from_checkpoint=str(trained / "checkpoint-2"), save_steps=2, max_steps=4)
    assert [path.name for path in told.glob("checkpoint-*")] == ["checkpoint-4"]  # earlier steps were not repeated
    assert (told / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out_rows": 1000}, "held_out_rows is 1000, and the text has no more rows of 16 tokens"),
        ({"window": 65}, "window is 65; the model reads at most 64 tokens"),
    ],
)
def test_the_training_script_says_what_does_not_fit(train_mfn, settings, message):
    with pytest.raises(ValueError, match=message):
        train_mfn("out", **settings)


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """Tiny model in place of the demo's checkpoint, and made-up verse in place of Shakespeare's.

    All text that the model generates contains an escape sequence that would clear the screen.
    """
    shuffled = random.Random(0)
    plays = []
    for number in range(6):
        lines = (" ".join(shuffled.sample(VERSE.split(), 12)) for _ in range(300))
        plays.append(tmp_path / f"play_{number}.txt")
        plays[-1].write_text("\n".join(lines))
    tokenizer = train_tokenizer(plays)
    base = make_base("llama-tied", vocab_size=len(tokenizer), num_hidden_layers=12, max_position_embeddings=256)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(demo_assets, "smollm2", lambda: tmp_path / "base")
    monkeypatch.setattr(demo_assets, "shakespeare", lambda: (plays[:4], plays[4:]))
    monkeypatch.chdir(tmp_path)
    decode = PreTrainedTokenizerFast.decode
    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", lambda *args, **how: decode(*args, **how) + "\x1b[2J[/red]")
    return tmp_path


@pytest.mark.parametrize(
    ("script", "made"),
    [
        ("quickstart", "quickstart/model"),
        ("steer", "quickstart/model"),
        ("explain", "explain/explanation.svg"),
        ("inspect_features", "inspect_features/features/atlas.json"),
        ("train_from_cache", "train_from_cache/training_record.json"),
        ("train_lora", "lora/merged"),
        ("share_on_hub", "share_on_hub/config.json"),
        pytest.param("sft_with_trl", "sft_with_trl", marks=TRL),
        pytest.param("evaluate_predictions", "evaluate_predictions/report.md", marks=pytest.mark.slow),
    ],
)
def test_the_scripts_run_offline(assets, monkeypatch, capsys, script, made):
    monkeypatch.setattr("sys.argv", [f"{script}.py"])
    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert (r"\x1b" in printed) == (script in ("quickstart", "steer", "explain", "inspect_features"))
    made = assets / "runs" / made
    assert made.exists()
    if script == "evaluate_predictions":
        assert "not measured" not in made.read_text()
    if script == "inspect_features":
        assert [label.label for label in FeatureAtlas.from_pretrained(made.parent.parent).labels] == ["my favourite"]
    elif made.is_dir():
        assert type(AutoModelForCausalLM.from_pretrained(made)) is MFNForCausalLM


def test_the_demo_leaves_a_model_whose_card_says_how_it_was_trained(assets, monkeypatch, capsys):
    small = {"LAYERS": [3, 7], "FEATURES": 64, "K": 4, "WINDOW": 16, "BATCH": 2, "CACHED_WINDOWS": 8, "PASSES": 2}
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    for name in ("smollm2", "shakespeare"):
        monkeypatch.setattr(demo, name, getattr(demo_assets, name))
    console = Console(file=io.StringIO(), width=400)
    figures = demo.run(assets, 0, console)
    printed = console.file.getvalue()
    assert "\x1b" not in printed
    assert printed.count(r"\x1b[2J[/red]") >= 2 + 3  # texts, and tokens in the table
    logs = "".join(capsys.readouterr())
    assert "explained variance" in logs
    assert "{" not in logs  # bars, and no dictionaries of figures
    assert figures["same_logits_at_alpha_0"]
    assert figures["same_logits_in_a_fresh_process"]
    assert figures["perplexity_alpha_0"] == figures["base_perplexity"] != figures["perplexity_alpha_1"]
    assert len(set(figures["texts"].values())) == 2
    record = json.loads((assets / "model" / "training_record.json").read_text())
    last, steps = figures["training"][-1], demo.JOINT_STEPS
    assert (record["steps"], record["tokens"]) == (steps, last["tokens"]) == (steps, steps * 2 * 16)
    assert round(record["figures"]["recon_loss"], 4) == last["recon_loss"]
    assert figures["steered_feature"] in FeatureAtlas.from_pretrained(assets / "model")
    card = ModelCard.load(assets / "model" / "README.md")
    assert f"{steps} of {steps} planned" in card.text
    assert "not recorded" not in card.text
    assert len([result for result in card.data.eval_results if result.metric_type == "perplexity"]) == 3
    assert not (assets / "cache").exists()

"""The scripts that people copy from, on a tiny model."""

import importlib.util
import json
import random
import runpy
import sys
from pathlib import Path

import pytest
from conftest import make_base
from huggingface_hub import ModelCard
from rich.console import Console
from test_data import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_mfn import FeatureAtlas, MFNForCausalLM, data, demo, demo_assets

EXAMPLES = Path(__file__).parent.parent / "examples"
VERSE = """Good my lord , the king is dead , and the queen weeps for him in the tower of the old town by night"""


@pytest.mark.parametrize(("large", "from_file"), [(100, False), (2**27, True)], ids=["streamed", "in memory"])
def test_the_training_script(tmp_path, monkeypatch, large, from_file):
    """Its own defaults hold wherever arguments come from, and text of any length trains."""
    monkeypatch.setattr(data, "LARGE", large)
    make_base("llama-tied").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("a line, and another line.\n" * 40)
    out = tmp_path / "out"
    given = {"model": str(tmp_path / "base"), "text": [str(tmp_path / "text.txt")], "output_dir": str(out)}
    given |= {"layers": "1", "k": 4, "window": 16, "held_out_rows": 4, "max_steps": 3, "learning_rate": 2e-3}
    given |= {"use_cpu": True, "disable_tqdm": True}
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
    record = json.loads((out / "training_record.json").read_text())
    assert (record["steps"], record["tokens"]) == (3, 3 * 2 * 16)
    assert record["arguments"]["learning_rate"] == 2e-3
    assert record["arguments"]["per_device_train_batch_size"] == 2
    assert "eval_recon_loss" in json.loads((out / "eval_results.json").read_text())
    assert MFNForCausalLM.from_pretrained(out).config.layers == [1]


def train_tokenizer(texts):
    """A byte-level BPE tokenizer of some files."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=special, initial_alphabet=alphabet)
    bpe.train([str(text) for text in texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A tiny model in place of the demo's checkpoint, and verse in place of Shakespeare's."""
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
        ("evaluate_predictions", "evaluate_predictions/report.md"),
    ],
)
def test_the_scripts_run_offline(assets, monkeypatch, script, made):
    monkeypatch.setattr("sys.argv", [f"{script}.py"])
    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    made = assets / "runs" / made
    assert made.exists()
    if script == "inspect_features":
        assert [label.label for label in FeatureAtlas.from_pretrained(made.parent.parent).labels] == ["my favourite"]
    elif made.is_dir():
        assert type(AutoModelForCausalLM.from_pretrained(made)) is MFNForCausalLM


def test_the_demo_leaves_a_model_whose_card_says_how_it_was_trained(assets, monkeypatch):
    for name, value in {"LAYERS": [3, 7], "FEATURES": 64, "K": 4, "WINDOW": 16, "BATCH": 2}.items():
        monkeypatch.setattr(demo, name, value)
    for name in ("smollm2", "shakespeare"):
        monkeypatch.setattr(demo, name, getattr(demo_assets, name))
    figures = demo.run(assets, 0, Console(quiet=True))
    record = json.loads((assets / "model" / "training_record.json").read_text())
    last = figures["training"][-1]
    assert (record["steps"], record["tokens"]) == (24, last["tokens"]) == (24, 24 * 2 * 16)
    assert record["figures"]["recon_loss"] == last["recon_loss"]
    card = ModelCard.load(assets / "model" / "README.md")
    assert "24 of 24 planned" in card.text
    assert "not recorded" not in card.text
    assert len(card.data.eval_results) == 3

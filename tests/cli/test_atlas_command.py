"""Tests of `mfn atlas` as a user runs it, on hostile text, and of the document that describes its files."""

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from atlas_data import HOSTILE
from command_line import run
from conftest import LLAMA, make_mfn
from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from trainings import train
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modeling_mfn import FeatureAtlas, MFNForCausalLM
from modeling_mfn.data.text import TextWindows
from modeling_mfn.features.atlas import schema
from modeling_mfn.features.atlas.table import atlas_table
from modeling_mfn.features.labelling.automatic import label_features
from modeling_mfn.model.feature_names import parse_feature
from modeling_mfn.utils.display import visible

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "atlas_files.md"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny model whose tokens are bytes and whole hostile strings."""
    folder = tmp_path_factory.mktemp("model")
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({piece: place for place, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.add_tokens(HOSTILE[:3])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(7)
    base = LlamaForCausalLM(LlamaConfig(**(LLAMA | {"vocab_size": 259}), initializer_range=0.2))
    make_mfn(base, layers=[1], num_features=40).save_pretrained(folder)
    return folder


def test_hostile_text_does_no_harm(model, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("\n".join(HOSTILE[:-1]) * 3, encoding="utf-8", newline="")
    (tmp_path / "long [red].txt").write_text(HOSTILE[-1])
    texts = ("--text", tmp_path / "short.txt", "--text", tmp_path / "long [red].txt")
    out = tmp_path / "out"
    assert run("atlas", model, out, *texts, "--tokens", 1024, "--window", 32) == 0
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.splitlines())
    atlas = FeatureAtlas.from_pretrained(out)
    assert [source["name"] for source in atlas.metadata["data"]["sources"]] == ["long [red].txt", "short.txt"]
    assert atlas.metadata["data"]["tokens"] == 2 * 16 * 31
    tokens = {token for example in atlas.to_pandas("examples")["tokens"] for token in example}
    assert tokens >= {*HOSTILE[:2], "\x1b", "\x00", "|"}  # kept without escapes
    console = Console(width=300)
    with console.capture() as captured:
        console.print(atlas_table(atlas, list(atlas)))
    assert all(line.isprintable() for line in captured.get().splitlines())
    assert all(visible(text, 24) in captured.get() for text in HOSTILE[:2])
    assert sorted(file.name for file in out.iterdir()) == ["features"]


def test_what_is_there_stays(model, tmp_path, capsys):
    """An atlas is replaced only with --overwrite. Human and imported labels stay. Bad input leaves no files."""
    (tmp_path / "text.txt").write_text("some words, and some more of them. " * 20)
    text, small = ("--text", tmp_path / "text.txt"), ("--window", 16, "--tokens", 160)
    out = tmp_path / "out"
    for arguments, message in [
        ((*text, "--window", 1), "window is 1"),
        ((*text, "--tokens", 0), "tokens is 0"),
        (("--text", tmp_path / "none.txt"), "none.txt"),
    ]:
        assert run("atlas", model, out, *arguments) == 2
        assert message in capsys.readouterr().err.replace("\n", "")
        assert not out.exists()
    assert run("atlas", "owner/model", *text) == 2
    assert "is not a folder to write an atlas into" in capsys.readouterr().err
    assert run("atlas", model, out, *text, *small) == 0
    atlas = FeatureAtlas.from_pretrained(out)
    atlas.label("L1/3", "mine")
    atlas.label("L1/4", "of others", source="imported")
    atlas.label("L1/5", "of the old harvest", source="automatic")
    atlas.save_pretrained(out)
    for option in ((), ("--resume", "--labels", tmp_path / "labels.csv")):
        assert run("atlas", model, out, *text, *small, *option) == 2
        assert "has an atlas" in capsys.readouterr().err
    assert FeatureAtlas.from_pretrained(out)["L1/3"].label == "mine"
    assert run("atlas", model, out, *text, *small, "--overwrite") == 0
    replaced = FeatureAtlas.from_pretrained(out)
    assert [replaced[name].label for name in ("L1/3", "L1/4", "L1/5")] == ["mine", "of others", None]


def test_an_atlas_that_is_there_is_labelled_as_it_is(model, tmp_path, capsys):
    text, labels, concepts = (tmp_path / name for name in ("text.txt", "labels.csv", "concepts.json"))
    text.write_text("some words, and some more of them. " * 40)
    labels.write_text("feature,label\nL1/3,imported\n")
    concepts.write_text('{"amounts": ["some", "more"], "speech": ["words", "them"]}')
    out = tmp_path / "out"
    assert run("atlas", model, out, "--text", text, "--window", 16, "--tokens", 160) == 0
    atlas = FeatureAtlas.from_pretrained(out)
    atlas.label("L1/2", "mine")
    atlas.label("L1/0", "of an earlier run", source="automatic")
    atlas.save_pretrained(out)
    others = {file: file.read_bytes() for file in (out / "features").iterdir() if file.name != "labels.json"}
    assert run("atlas", model, out, "--concepts", concepts) == 2
    assert "give --text" in capsys.readouterr().err

    assert run("atlas", model, out, "--labels", labels) == 0
    assert run("atlas", model, out, "--concepts", concepts, "--text", text, "--window", 32) == 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    words = json.loads(concepts.read_text())
    loaded = MFNForCausalLM.from_pretrained(model)
    label_features(atlas, loaded, tokenizer, TextWindows([text], tokenizer, 32), words, progress=False)
    atlas.label("L1/3", "imported", source="imported")
    assert list(FeatureAtlas.from_pretrained(out).labels) == list(atlas.labels)
    assert {label.source for label in atlas.labels} == {"human", "imported", "automatic"}
    assert {file: file.read_bytes() for file in others} == others


def test_the_atlas_of_other_features_is_refused(model, tmp_path, capsys):
    """Edits and casts keep an atlas. Another training, or training on, makes it that of another model."""
    (tmp_path / "text.txt").write_text("some words, and some more of them. " * 20)
    command = ("--text", tmp_path / "text.txt", "--window", 16, "--tokens", 160)
    own, trained = tmp_path / "own", tmp_path / "trained"
    shutil.copytree(model, own)
    assert run("atlas", own, *command) == 0
    atlas = FeatureAtlas.from_pretrained(own)
    used = next(name for name in atlas if atlas[name].firing_count)
    atlas.label(used, "mine")
    atlas.save_pretrained(own)
    steer = ("some", "--set", "mine=clamp:2", "--max-new-tokens", 1)
    loaded = MFNForCausalLM.from_pretrained(own).to(torch.bfloat16)
    unused = next(index for layer, index in map(parse_feature, atlas) if (layer, index) != parse_feature(used))
    loaded.prune_features(1, [unused])
    loaded.compact()
    loaded.save_pretrained(own)
    assert run("steer", own, *steer) == 0
    shutil.copytree(own, trained)
    ids = {"input_ids": [[5, 6, 7, 8]] * 8, "labels": [[5, 6, 7, 8]] * 8}
    further = MFNForCausalLM.from_pretrained(own, dtype=torch.float32)
    train(trained, further, Dataset.from_dict(ids), max_steps=1).save_model()
    capsys.readouterr()
    for arguments in (
        ("steer", trained, *steer),
        ("explain", trained, "some"),
        ("atlas", trained, *command, "--overwrite"),
    ):
        assert run(*arguments) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert "the atlas is of own with the features" in error
        assert "trained has the features" in error
    assert FeatureAtlas.from_pretrained(trained)[used].label == "mine"
    (trained / "features" / "labels.json").unlink()
    assert run("atlas", trained, *command, "--overwrite") == 0


def test_only_an_atlas_is_replaced(model, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("some words, and some more of them. " * 20)
    (tmp_path / "out" / "features").mkdir(parents=True)
    (tmp_path / "out" / "features" / "mine.csv").write_text("1")
    command = ("atlas", model, tmp_path / "out", "--text", tmp_path / "text.txt", "--overwrite")
    assert run(*command) == 2
    assert "features holds mine.csv, which mfn did not write" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "out" / "features" / "mine.csv").read_text() == "1"


def test_a_harvest_is_kept_until_its_atlas_is_saved(model, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("some words, and some more of them. " * 20)
    out = tmp_path / "out"
    command = ("atlas", model, out, "--text", tmp_path / "text.txt", "--window", 16, "--tokens", 160)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pyarrow.parquet.write_table", full)
        assert run(*command) == 2
    assert [file.name for file in out.iterdir()] == [".features-harvest"]
    monkeypatch.setattr("modeling_mfn.features.harvest.harvest.count_batch", full)  # nothing is counted again
    assert run(*command, "--resume") == 0
    assert [file.name for file in out.iterdir()] == ["features"]


def test_an_interrupted_harvest_is_resumed_or_started_anew(model, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("some words, and some more of them. " * 40)
    out = tmp_path / "out"
    state = out / ".features-harvest"
    command = ("atlas", model, out, "--text", tmp_path / "text.txt", "--window", 16)

    class Broken(TextWindows):
        def __iter__(self):
            yield from islice(super().__iter__(), 20)
            raise KeyboardInterrupt

    def interrupt():
        loaded, tokenizer = MFNForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
        rows = Broken([tmp_path / "text.txt"], tokenizer, 16)
        with pytest.raises(KeyboardInterrupt):
            FeatureAtlas.build(loaded, tokenizer, rows, state_folder=state, save_every=8, progress=False)

    interrupt()
    for options in ((), ("--resume", "--tokens", 640), ("--resume", "--batch-size", 4)):
        assert run(*command, *options) == 2
        assert "(--overwrite)" in capsys.readouterr().err
    assert run("atlas", model, out, "--text", tmp_path / "none.txt", "--overwrite") == 2
    assert list(state.iterdir())  # bad input leaves the state
    assert run(*command, "--resume") == 0
    interrupt()
    assert run(*command, "--overwrite", "--tokens", 640) == 0
    assert FeatureAtlas.from_pretrained(out).metadata["data"]["windows"] == 40
    assert not state.exists()


def test_the_document_describes_the_files():
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    for field in (*schema.FEATURES, *schema.EXAMPLES):
        description = field.metadata[b"description"].decode()
        assert any(line.startswith(f"| `{field.name}` |") and line.endswith(f"| {description} |") for line in lines)
    assert [f"| `{theirs}` | `{ours}` |" in lines for theirs, ours in schema.NEURONPEDIA.items()].count(False) == 0
    assert any("| `schema_version` | 1 |" in line for line in lines) == (schema.SCHEMA_VERSION == 1)

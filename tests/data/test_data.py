"""Text from files, folders and data sets, in memory and streamed, cut into windows of tokens."""

import json
import re
import shutil

import pytest
from conftest import make_base
from datasets import Dataset, IterableDataset, load_dataset_builder
from tokenizers_for_tests import BOS, CHARACTERS, EOS, IDS, as_they_come, make_tokenizer
from transformers import Trainer, TrainingArguments

from modeling_mfn.cli.main import main
from modeling_mfn.data import text as data
from modeling_mfn.data.text import load_text, pack


def write(folder, documents):
    for name, text in documents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return [folder / name for name in documents]


DOCUMENTS = {
    "a.txt": "one line,\nanother line.\n\n  a third, indented.\n",
    "b.md": "a line much longer than a piece, without an end of a line" * 3,
    "empty.txt": "",
    "c.txt": "café\r\n" + "line\n" * 20,
}


@pytest.mark.parametrize("piece", [1, 7, 30, 2**18])
@pytest.mark.parametrize("large", [0, 100, 2**27])
@pytest.mark.parametrize("adds_special_tokens", [False, True])
def test_windows_are_those_of_the_joined_documents(tmp_path, monkeypatch, piece, large, adds_special_tokens):
    monkeypatch.setattr(data, "PIECE_LENGTH", piece)
    monkeypatch.setattr(data, "TOKENISED_AT_ONCE", 8 * piece)
    monkeypatch.setattr(data, "STREAM_ABOVE", large)
    before, after = ([BOS] if adds_special_tokens else []), [EOS]
    joined = []
    for text in DOCUMENTS.values():
        joined += [*before, *(IDS[character] for character in text.replace("\r\n", "\n")), *after] if text else []
    expected = [joined[start : start + 9] for start in range(0, len(joined) - 8, 9)]

    texts = load_text(write(tmp_path, DOCUMENTS))
    windows = pack(texts, make_tokenizer(adds_special_tokens), 9)
    assert isinstance(windows, IterableDataset if large < 2**27 else Dataset)
    for _ in range(2):
        rows = list(windows)
        assert [row["input_ids"] for row in rows] == expected
        assert [row["labels"] for row in rows] == expected
    assert max(len(row["text"]) for row in texts) <= 2 * piece


def test_one_end_of_text_token_stands_between_documents(tmp_path):
    """GPT-2's tokenizer may begin a text with it, and Llama's may end a text with it."""
    texts = load_text(write(tmp_path, {"a.txt": "the king", "b.txt": "the queen"}))
    for family, settings, begins in (
        ("gpt2", {}, "{}"),
        ("gpt2", {"add_bos_token": True}, "e{}"),
        ("llama", {}, "b{}"),
        ("llama", {"add_eos_token": True}, "b{}"),
    ):
        tokenizer = as_they_come(family, ["the king", "the queen"] * 9, **settings)
        special = {"b": tokenizer.bos_token_id, "e": tokenizer.eos_token_id}
        expected = []
        for text in ("the king", "the queen"):
            before = [special[letter] for letter in begins.format("")]
            after = [] if special["e"] in before else [special["e"]]
            expected += [*before, *tokenizer(text, add_special_tokens=False)["input_ids"], *after]
        ids = [token for row in pack(texts, tokenizer, 2) for token in row["input_ids"]]
        assert ids == expected[: len(expected) // 2 * 2]
        assert ids.count(special["e"]) in (1, 2)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "the king"), ("a.csv", "text,n\nthe king,1\n"), ("a.jsonl", '{"text": "the king"}\n')],
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert [row["text"] for row in load_text([tmp_path / name])] == ["the king"]


def test_pieces_end_with_a_line_unless_it_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE_LENGTH", 8)
    rows = list(load_text(write(tmp_path, {"a.txt": "one, two\nthree\nfour\nfour, five, six, seven\n", "b.txt": "b"})))
    assert [row["text"] for row in rows] == ["one, two\n", "three\nfour\n", "four, five, six,", " seven\n", "b"]
    assert [row["continues"] for row in rows] == [True, True, True, False, False]


@pytest.mark.parametrize("large", [0, 2**27])
def test_a_folder_of_all_kinds(tmp_path, monkeypatch, large):
    monkeypatch.setattr(data, "STREAM_ABOVE", large)
    folder = tmp_path / ".cache" / "all [kinds]*"
    write(
        folder,
        {
            ".git/config": "hidden",
            ".hidden.txt": "hidden",
            "a.txt": "plain",
            "b.jsonl": '{"text": "line one"}\n{"text": null}\n{"text": ""}\n{"n": 1, "text": "line two"}\n',
            "c/d.csv": 'n,text\n1,"quoted\ntext"\n2,\n',
            "c/e.JSON": '[{"text": "object one"}, {"text": "object two"}]',
            "c/none.jsonl": "",
            "z": "no suffix",
        },
    )
    Dataset.from_dict({"text": ["column", None], "n": [1, 2]}).to_parquet(folder / "c" / "f.parquet")
    in_order = ["plain", "line one", "line two", "quoted\ntext", "object one", "object two", "column", "no suffix"]
    texts = load_text([folder, str(folder / "a.txt")])
    assert isinstance(texts, IterableDataset) == (large == 0)
    assert list(texts) == [{"text": text, "continues": False} for text in [*in_order, "plain"]]


def test_another_column(tmp_path):
    (file,) = write(tmp_path, {"a.csv": "text,body\n1,one\n2,two\n"})
    assert load_text([file], column="body")["text"] == ["one", "two"]


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({}, "{folder}/none", "{folder}/none is not a file, a folder or the name of a data set (NAME or NAME:CONFIG)"),
        ({}, "none.jsonl", "none.jsonl is not a file, a folder or"),
        ({}, "owner/none.parquet", "owner/none.parquet is not a file, a folder or"),
        ({}, "a/b/c", "a/b/c is not a file, a folder or"),
        ({}, "./none", "./none is not a file, a folder or"),
        ({}, "", " is not a file, a folder or"),
        ({}, "none", "data set none (there is no such file or folder) cannot be read as text: Couldn't reach 'none'"),
        ({}, "owner/name-v1.5:config.en", "data set owner/name-v1.5:config.en (there is no such file or folder)"),
        ({"a.jsonl": '{"text": "x"}\n'}, "json", "cannot be read as text: there is no such data set on the Hub"),
        ({}, "{folder}", "no text in {folder}"),
        ({"a.txt": "", "b.txt": " \n\t"}, "{folder}", "no text in {folder}"),
        ({"a.jsonl": ""}, "{folder}/a.jsonl", "no text in {folder}/a.jsonl"),
        ({"a.csv": "n,text\n1,\n"}, "{folder}/a.csv", "no text in {folder}/a.csv"),
        (
            {"a.csv": "one,two\n1,2\n"},
            "{folder}",
            "{folder}/a.csv cannot be read as text: it has no column 'text', only one, two; choose with --text-column",
        ),
        ({"a.jsonl": '{"one": "x"}\n'}, "{folder}", "it has no column 'text', only one; choose with --text-column"),
        ({"a.jsonl": '{"text": ["x"]}\n'}, "{folder}", "its column 'text' holds list, not text"),
        ({"a.csv": "text\n1\n"}, "{folder}", "{folder}/a.csv cannot be read as text: its column 'text' holds int"),
        ({"a.jsonl": '{"text": '}, "{folder}", "{folder}/a.jsonl cannot be read as text: JSON parse error"),
        ({"a.parquet": "x"}, "{folder}", "{folder}/a.parquet cannot be read as text: Parquet"),
    ],
)
def test_bad_sources_are_named(tmp_path, monkeypatch, files, source, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, files)
    with pytest.raises(ValueError, match=re.escape(message.format(folder=tmp_path))):
        load_text([source.format(folder=tmp_path)])


@pytest.mark.parametrize("good", [0, 100])
def test_a_file_that_is_not_utf_8_is_named(tmp_path, monkeypatch, good):
    """The file is named at once, and after a part of the stream was read."""
    monkeypatch.setattr(data, "STREAM_ABOVE", 50)
    (tmp_path / "a.txt").write_bytes(b"line\n" * good + "é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt cannot be read as text: 'utf-8' codec"):
        list(load_text([tmp_path / "a.txt"]))


@pytest.mark.parametrize("large", [0, 2**27])
def test_less_than_a_window(tmp_path, monkeypatch, large):
    monkeypatch.setattr(data, "STREAM_ABOVE", large)
    texts = load_text(write(tmp_path, {"a.txt": "six"}))
    assert len(list(pack(texts, make_tokenizer(), 4))) == 1
    with pytest.raises(ValueError, match=r"^the text has 4 tokens, less than one window of 5$"):
        pack(texts, make_tokenizer(), 5)
    with pytest.raises(ValueError, match=r"^window is 0; it must be a whole number of at least 2"):
        pack(texts, make_tokenizer(), 0)


@pytest.mark.parametrize(("size", "streamed"), [(None, True), (10**6, True), (10, False)])
def test_a_data_set_is_downloaded_where_it_is_known_to_be_small(tmp_path, monkeypatch, size, streamed):
    """A folder stands in for the Hub; `datasets` builds the data set from there."""
    write(tmp_path / "hub", {"data.jsonl": '{"text": "one"}\n{"text": "two"}\n'})
    asked, downloaded = [], []

    def hub(name, config):
        asked.append((name, config))
        folder = str(tmp_path / "hub")
        builder = load_dataset_builder("json", data_files=f"{folder}/*.jsonl", cache_dir=str(tmp_path / "cache"))
        builder.repo_id, builder.info.download_size = name, size
        download = builder.download_and_prepare
        builder.download_and_prepare = lambda: downloaded.append(name) or download()
        return builder

    monkeypatch.setattr(data, "load_dataset_builder", hub)
    monkeypatch.setattr(data, "STREAM_ABOVE", 1000)
    assert load_text(["owner/name:config"])["text"] == ["one", "two"]
    assert asked == [("owner/name", "config")]
    assert bool(downloaded) != streamed
    with pytest.raises(ValueError, match=r"owner/name \(there is no .*: .*[sS]plit.*test"):
        load_text(["owner/name"], split="test")


TEXT = " ".join(CHARACTERS[2 + place * place % 26] * (place % 5 + 1) for place in range(300))


@pytest.mark.parametrize("large", [0, 2**27])
def test_the_trainer_trains_on_windows_for_several_epochs(tmp_path, monkeypatch, large):
    monkeypatch.setattr(data, "STREAM_ABOVE", large)
    windows = pack(load_text(write(tmp_path, {"a.txt": TEXT})), make_tokenizer(), 16)
    settings = {"max_steps": 30, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 1e-2}
    arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[], save_strategy="no", **settings)
    trainer = Trainer(make_base("llama-tied"), arguments, train_dataset=windows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history[:-1]]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("large", [0, 2**27])
def test_mfn_train_resumes_where_it_was(tmp_path, monkeypatch, large):
    """Resuming works in the second pass over the text, streamed or not."""
    monkeypatch.setattr(data, "STREAM_ABOVE", large)
    make_base("llama-tied").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    write(tmp_path, {"a.jsonl": json.dumps({"body": TEXT})})
    source = ("--text", tmp_path / "a.jsonl", "--text-column", "body")
    options = ("--steps", 19, "--window", 16, "--batch-size", 8, "--save-steps", 15)

    def run(*words):
        with pytest.raises(SystemExit) as leaving:
            main([str(word) for word in words])
        assert not leaving.value.code

    def losses(output):
        state = json.loads((output / "checkpoint-19" / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    run("convert", tmp_path / "base", tmp_path / "mfn", "--num-features", 64, "--k", 8)
    run("train", tmp_path / "mfn", tmp_path / "whole", *source, *options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-15", tmp_path / "part" / "checkpoint-15")
    run("train", tmp_path / "mfn", tmp_path / "part", *source, *options, "--resume")
    assert len(losses(tmp_path / "whole")) == 19
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")

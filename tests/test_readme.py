"""README is short, has short sentences, and runs as pasted."""

import contextlib
import io
import random
import re
from pathlib import Path

import pytest
from conftest import make_base
from prose import blocks, sentences, words
from tokenizers_for_tests import VERSE, as_they_come

from modeling_mfn.demo import assets

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_readme_is_short_and_so_are_its_sentences():
    assert TEXT.count("\n") <= 150
    long = [sentence for sentence in sentences(TEXT) if words(sentence) > 30]
    assert not long
    assert len(sentences(TEXT)) > 10


def quickstart():
    section = re.search(r"^## Quickstart$.*?(?=^## )", TEXT, re.MULTILINE | re.DOTALL)
    return list(blocks(section[0]))


def printed_by(found):
    """Runs the blocks in order in one namespace and returns the printed lines of each."""
    namespace, printed = {"__name__": "__main__"}, []
    for block in found:
        stream = io.StringIO()
        with contextlib.redirect_stdout(stream):
            exec(compile(block.code, str(README), "exec"), namespace)
        printed.append(stream.getvalue().splitlines())
    return printed


SIZES = {
    "llama": {"num_hidden_layers": 10, "max_position_embeddings": 256},
    "gpt2": {"n_layer": 10, "n_positions": 256},
}


@pytest.mark.halved
@pytest.mark.parametrize("family", SIZES)
def test_the_quickstart_runs_on_any_model_without_a_network(tmp_path, monkeypatch, family):
    """A tiny base gives other outputs of the same form. Its tokenizer has no token for padding."""
    shuffled = random.Random(0)
    plays = [tmp_path / f"play_{number}.txt" for number in range(4)]
    for play in plays:
        play.write_text("\n".join(" ".join(shuffled.sample(VERSE.split(), 12)) for _ in range(300)))
    tokenizer = as_they_come(family, [play.read_text() for play in plays], 600)
    base = make_base(f"{family}-tied", vocab_size=len(tokenizer), pad_token_id=None, **SIZES[family])
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(assets, "smollm2", lambda: tmp_path / "base")
    monkeypatch.setattr(assets, "shakespeare", lambda: (plays, plays))
    monkeypatch.chdir(tmp_path)
    found = quickstart()
    assert sum(block.output is not None for block in found) >= 3
    for lines, block in zip(printed_by(found), found, strict=True):
        left = iter(lines)  # a training prints lines of its own, and a generated text may have line breaks
        for shown in (block.output or "").splitlines():
            start = shown if shown == "True" else shown[:2]
            assert any(line.startswith(start) for line in left)


@pytest.mark.checkpoint
def test_the_quickstart_prints_what_readme_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = quickstart()
    expected = [(block.output or "").splitlines() for block in found]
    # a training prints lines of its own first
    ends = [lines[len(lines) - len(of) :] for lines, of in zip(printed_by(found), expected, strict=True)]
    assert ends == expected

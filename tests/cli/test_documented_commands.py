"""Every command `mfn` of README and the documents runs, on both families, with tokenizers as they really come."""

import json
import random
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import run
from conftest import make_base
from prose import FENCED
from tokenizers_for_tests import VERSE, as_they_come

from modeling_mfn import FeatureAtlas, MFNForCausalLM
from modeling_mfn.explorer.server import app
from modeling_mfn.hub import push as hub
from modeling_mfn.hub import push_explorer

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "docs" / "get_started" / "quickstart.md"
ELSEWHERE = {"demo", "serve"}
"""Verbs that need a network or an extra, and have tests of their own."""
SMALLER = {
    "train": ["--steps", "4", "--window", "32", "--batch-size", "4"],
    "atlas": ["--tokens", "4096", "--window", "32"],
    "evaluate": ["--tokens", "512", "--train-tokens", "256", "--window", "32", "--predictions", "P1"],
    "steer": ["--max-new-tokens", "4"],
    "unwrap": ["--tokens", "512", "--window", "32"],
}
"""Options that make a command take seconds; the last value of an option counts."""
SIZES = {
    "llama": {"hidden_size": 160, "num_hidden_layers": 8, "max_position_embeddings": 256},
    "gpt2": {"n_embd": 160, "n_layer": 8, "n_positions": 256},
}
ANIMALS = ["cat", "dog", "horse", "cow", "sheep", "goat", "pig", "hen", "duck", "wolf", "bear", "lion"]


def commands(page):
    """Arguments of the commands in the shell blocks of a page."""
    for block in FENCED.finditer(page.read_text(encoding="utf-8")):
        for line in re.sub(r"\\\n\s*", " ", block["body"]).splitlines() if block["language"] == "bash" else ():
            program, *arguments = shlex.split(line, comments=True) or [""]
            if program == "mfn" and arguments[0] not in ELSEWHERE:
                yield arguments


GUIDES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("g*/*.md")))
    if page != QUICKSTART and any(commands(page))
]
FAMILY_AND_PAGE = [
    pytest.param(family, page, id=f"{family}-{page.stem}", marks=[] if place % 2 == own else pytest.mark.slow)
    for own, family in enumerate(SIZES)
    for place, page in enumerate(GUIDES)
]
"""Every page runs with one family, and with the other in the slow tests."""


def run_smaller(arguments):
    line = [*arguments, *SMALLER.get(arguments[0], [])]
    assert run(*line) == 0, shlex.join(line)


WORKSPACES = {}
"""Family -> folder. A fixture of the module would be made anew where tests are spread over processes."""


def push_nothing(patch):
    """Replaces all that asks the Hub."""
    patch.setattr(hub, "push", lambda *given, **options: SimpleNamespace(commit_url=given[1]))
    patch.setattr(push_explorer, "push_explorer", lambda *given, **options: SimpleNamespace(commit_url=given[1]))
    patch.setattr(push_explorer, "push_space", lambda *given, **options: given[1])
    patch.setattr(push_explorer, "has_explorer", lambda *given, **options: False)


def make_workspace(family, folder):
    """Fills a folder with a base model and texts, and runs the quickstart there from its first command to its last."""
    shuffled = random.Random(0)
    words = [*VERSE.split(), *ANIMALS]
    lines = ["The weather is " + " ".join(shuffled.choices(words, k=12)) + "." for _ in range(900)]
    (folder / "corpus.txt").write_text("\n".join(lines[:600]))
    (folder / "held-out.txt").write_text("\n".join(lines[600:]))
    (folder / "concepts.json").write_text(json.dumps({"animals": ANIMALS}))
    tokenizer = as_they_come(family, lines, 600)
    assert tokenizer.pad_token is None
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) == (family == "llama")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    sizes = {"vocab_size": len(tokenizer)} | SIZES[family] | ends
    make_base(f"{family}-tied", **sizes).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        push_nothing(patch)
        for arguments in commands(QUICKSTART):
            run_smaller(arguments)
            if arguments[0] == "atlas":  # the next command steers by a label
                alive = FeatureAtlas.from_pretrained(arguments[1]).to_pandas().query("status == 'alive'")
                Path("labels.csv").write_text(f"feature,label\n{alive['name'].iloc[0]},animals\n")
                assert run("atlas", arguments[1], "--labels", "labels.csv") == 0


@pytest.fixture
def prepared(family, tmp_path, tmp_path_factory, monkeypatch):
    """A copy of the workspace with the models that the guides call by other names."""
    if family not in WORKSPACES:
        made = tmp_path_factory.mktemp(family)
        make_workspace(family, made)
        WORKSPACES[family] = made
    shutil.copytree(WORKSPACES[family], tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    push_nothing(monkeypatch)
    trained = MFNForCausalLM.from_pretrained("gpt2-mfn-trained")
    trained.save_preset("calm", {"L5/1": {"kind": "ablate"}})
    trained.save_pretrained("gpt2-mfn-trained")
    for name in ("MODEL", "FOLDER", "gpt2-mfn-seed-1", "me/gpt2-mfn"):
        shutil.copytree("gpt2-mfn-trained", name)
    shutil.copytree("gpt2-mfn-trained/features", "my-atlas/features")
    monkeypatch.setattr(app, "run_explorer", lambda *parts, **options: None)  # a server would not end


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize(("family", "page"), FAMILY_AND_PAGE)
def test_the_commands_of_a_page_run(page):
    for arguments in commands(page):
        if arguments[0] in ("convert", "train", "unwrap"):
            shutil.rmtree(arguments[2], ignore_errors=True)
        if "--static" in arguments:
            shutil.rmtree("site", ignore_errors=True)
        if arguments[0] == "atlas" and "--labels" not in arguments:
            shutil.rmtree(Path(arguments[1], "features"), ignore_errors=True)
        run_smaller(arguments)

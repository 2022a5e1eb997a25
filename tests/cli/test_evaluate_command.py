"""`mfn evaluate` on tiny models, as a user runs it, and its errors."""

import json
import random
import shutil

import pytest
import torch
from command_line import run
from conftest import make_base, make_mfn
from matplotlib.figure import Figure
from tokenizers_for_tests import VERSE, train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_mfn import MFNForCausalLM
from modeling_mfn.cli.evaluate import read_windows
from modeling_mfn.evaluation import report
from modeling_mfn.evaluation.study import PREDICTIONS
from modeling_mfn.hub.card import model_card

OF_BOTH = [word for name in ("court", "town") for word in ("--train-text", f"{name}={{0}}/{name}-train.txt")]
WORDS = {"people": ["king", "queen", "lord", "him"], "places": ["tower", "town"], "times": ["night", "old"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes a tiny base model, MFN models made from it, other models, and verse of two domains.

    Verse of the town lacks the word "queen".
    """
    folder = tmp_path_factory.mktemp("evaluate")
    shuffled = random.Random(0)
    for name in ("court", "court-train", "town", "town-train"):
        words = [word for word in VERSE.split() if "town" not in name or word != "queen"]
        (folder / f"{name}.txt").write_text("\n".join(" ".join(shuffled.sample(words, 12)) for _ in range(150)))
    tokenizer = train_tokenizer(folder.glob("*.txt"))
    base = make_base("llama-tied", vocab_size=len(tokenizer))
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for seed in (0, 1):
        make_mfn(base, seed=seed, layers=[1], num_features=64, k=4).save_pretrained(folder / f"mfn-{seed}")
        tokenizer.save_pretrained(folder / f"mfn-{seed}")
    make_mfn(base, layers=[1], num_features=64, k=2).save_pretrained(folder / "small-k")
    make_base("llama-tied", vocab_size=len(tokenizer), num_hidden_layers=5).save_pretrained(folder / "deep")
    make_base("llama-tied", vocab_size=len(tokenizer), initializer_range=0.1).save_pretrained(folder / "other")
    for name in ("concepts", "more"):
        (folder / f"{name}.json").write_text(json.dumps(WORDS))
    return folder


@pytest.fixture(autouse=True)
def empty_figures(monkeypatch):
    """Figures take as long as all measurements here; they have tests of their own."""
    monkeypatch.setattr(report, "draw", lambda result: Figure())


def command(folder, *more, texts=("court", "town")):
    given = [word for name in texts for word in ("--text", f"{name}={folder / name}.txt")]
    return ["evaluate", folder / "mfn-0", folder / "mfn-1", *given, "--window", 16, "--tokens", 1024, *more]


def baselines(folder, *names):
    texts = [word for name in names for word in ("--train-text", f"{name}={folder / name}-train.txt")]
    return ["--base", folder / "base", *texts, "--train-tokens", 1024]


def test_all_five_are_measured_with_baselines_and_kept(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    options = [*baselines(folder, "court", "town"), "--source", "court", "--output", out]
    options += ["--no-rate", folder / "mfn-1", "--concepts", folder / "concepts.json"]
    options += ["--concepts", folder / "more.json"]
    assert run(*command(folder, *options)) == 0
    printed = capsys.readouterr().out
    text = (out / "report.md").read_text()
    for name in PREDICTIONS:
        result = json.loads((out / f"{name}.json").read_text(), parse_constant=pytest.fail)
        assert name in printed
        assert f"## {name}: " in text
        assert result["outcome"] != "not measured" or "task" in result["reason"], result["reason"]
        assert result["settings"]["source"] == "court"
        assert (out / "figures" / f"{name}.svg").exists()
        assert result["settings"]["concepts"] == ["concepts", "more"]
    kept = {folder.name for folder in (out / "baselines").iterdir()}
    assert {"sae-court-seed-0", "sae-court-seed-1", "sae-tuned-on-town-seed-0", "random-seed-0"} <= kept

    before = {file: file.stat().st_mtime_ns for file in out.glob("P*.json")}
    (out / "P3.json").unlink()
    (out / "figures" / "P1.svg").unlink()
    monkeypatch.setitem(PREDICTIONS, "P1", lambda evidence: pytest.fail("P1 was there"))
    assert run(*command(folder, *options)) == 0
    after = {file: file.stat().st_mtime_ns for file in out.glob("P*.json")}
    assert {file.name for file in before if before[file] != after[file]} == {"P3.json"}
    assert (out / "figures" / "P1.svg").exists()


def test_what_is_not_given_is_not_measured(folder, tmp_path):
    out = tmp_path / "out"
    assert run(*command(folder, "--output", out, texts=["court"])) == 0
    outcomes = {name: json.loads((out / f"{name}.json").read_text())["outcome"] for name in PREDICTIONS}
    assert outcomes == dict.fromkeys(PREDICTIONS, "not measured")


def test_another_k_or_base_is_measured_again(folder, tmp_path, monkeypatch, capsys):
    """Results are measured again although the names of the models stay."""
    mfn, base = (shutil.copytree(folder / name, tmp_path / name) for name in ("mfn-0", "base"))
    (mfn / "training_record.json").write_text(json.dumps({"tokens": 7_000_000}))
    measured, measure = [], PREDICTIONS["P3"]
    monkeypatch.setitem(PREDICTIONS, "P3", lambda evidence: measured.append(1) or measure(evidence))
    texts = ["--text", f"court={folder / 'court'}.txt", *baselines(folder, "court"), "--base", base]
    options = ["--predictions", "P3", "--window", 16, "--tokens", 128, "--output", tmp_path / "out"]
    for expected, change in enumerate((None, MFNForCausalLM, AutoModelForCausalLM), start=1):
        if change is not None:
            model = change.from_pretrained(mfn if change is MFNForCausalLM else base)
            model.set_k(2) if change is MFNForCausalLM else model.lm_head.weight.data.mul_(1.1)
            model.save_pretrained(model.name_or_path)
        for _ in range(2):
            assert run("evaluate", mfn, *texts, *options) == 0
            assert len(measured) == expected
    settings = json.loads((tmp_path / "out/P3.json").read_text())["settings"]
    assert (settings["k"], settings["alpha"], settings["learnt_from_tokens"]) == (2, [1.0], [7_000_000])
    note = "a model learnt from 7,000,000 tokens, and baselines learn from 1,024"
    assert note in " ".join(capsys.readouterr().out.split())


def test_perplexities_go_into_the_models_card(folder, tmp_path):
    """Compares with the loss of transformers. Perplexities of other text stay; older ones of this text are replaced."""
    mfn = tmp_path / "mfn"
    model = MFNForCausalLM.from_pretrained(folder / "mfn-0")
    model.set_blend(0.5)
    model.save_pretrained(mfn)
    tokenizer = AutoTokenizer.from_pretrained(folder / "mfn-0")
    tokenizer.save_pretrained(mfn)
    other = {"data": "elsewhere", "base": 2.0, "alpha_1": 3.0}
    old = {"data": "court, 8 windows of 16 tokens", "alpha_1": 99.0}
    (mfn / "evaluation.json").write_text(json.dumps({"perplexity": [other, old], "more": 1}))
    options = ["--window", 16, "--tokens", 128, "--predictions", " p3", "--output", tmp_path / "out"]
    (tmp_path / "year=1599").mkdir()
    text = tmp_path / "year=1599" / "court.txt"
    text.symlink_to(folder / "court.txt")
    assert run("evaluate", mfn, "--text", text, *baselines(folder, "court"), *options) == 0

    ids = torch.tensor(read_windows(str(folder / "court.txt"), tokenizer, 16, 128)["input_ids"])
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    expected = {"base": base(ids, labels=ids).loss.exp().item()}
    expected |= {"alpha_0": expected["base"], "alpha_0.5": model(ids, labels=ids).loss.exp().item()}
    assert expected["alpha_0.5"] != pytest.approx(expected["base"], rel=0.01)
    written = json.loads((mfn / "evaluation.json").read_text())
    kept, row = written.pop("perplexity")
    assert (kept, written) == (other, {"more": 1})
    measured = {"weights": model.config.weights_digest, "k": model.config.k}
    assert row == {"data": old["data"], "tokens": 128} | measured | {
        n: pytest.approx(p, abs=1e-2) for n, p in expected.items()
    }
    card = model_card(mfn)
    results = [result for result in card.data.eval_results if "court" in result.dataset_name]
    found = {result.metric_name: result.metric_value for result in results}
    assert found == {
        "perplexity, base model": row["base"],
        "perplexity, alpha 0": row["alpha_0"],
        "perplexity, alpha 0.5": row["alpha_0.5"],
    }
    assert "| text | tokens | base model | alpha 0 | alpha 0.5 | alpha 1 |" in card.text


def test_what_was_measured_is_reported_though_another_prediction_fails(folder, tmp_path, monkeypatch):
    def fail(evidence):
        raise ValueError("too little of something")

    monkeypatch.setitem(PREDICTIONS, "P4", fail)
    options = [*baselines(folder, "court", "town"), "--output", tmp_path / "out"]
    assert run(*command(folder, "--predictions", "P1,P3,P4,P5", *options)) == 2
    text = (tmp_path / "out" / "report.md").read_text()
    assert [name for name in PREDICTIONS if f"## {name}: " in text] == ["P1", "P3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--predictions", "P1,P6"], "predictions are P1, P6; give some of P1, P2, P3, P4, P5"),
        (["--base", "{0}/base"], "base is given without train-text"),
        (["--source", "court"], "source is given without base"),
        (["--base", "{0}/base", "--train-text", "town={0}/town.txt", "--source", "court"], "source is 'court'"),
        (["--text", "court={0}/town.txt"], "two texts are of domain 'court'"),
        (["--text", "=x"], "'=x' is not a text"),
        (["--text", "other={0}/other.txt"], "other.txt"),
        (["--concepts", "{0}/court.txt"], "court.txt"),
        (["--output", "{0}/court.txt"], "court.txt is a file"),
        (["--concepts", "{0}/concepts.json"] * 2, "concepts are of {0}/concepts.json, but there is a group 'concepts'"),
        (["--dense", "{0}/base"], "dense is given without source"),
        (["--window", "4096"], "window is 4096; the model reads at most"),
        (["--tokens", "16"], "text 'court' has 1 windows of 16 tokens; intervals need at least 2"),
        (["--epochs", "0"], "--epochs"),
        (["--window", "10"], "window is 10; P4 needs 11 tokens or more"),
        (["--no-rate", "{0}/small-k"], "k of {0}/small-k is 2; that of {0}/mfn-0 is 4"),
        (
            ["--base", "{0}/deep", "--train-text", "court={0}/court-train.txt"],
            "num_hidden_layers of {0}/deep is 5; that of the backbone of {0}/mfn-0 is 3",
        ),
        (
            ["--base", "{0}/base", "--train-text", "court={0}/court.txt"],
            "64 of 64 windows of text 'court' are in train-text",
        ),
        (
            ["--base", "{0}/other", *OF_BOTH, "--source", "court"],
            "the backbone of model 1 is not that of {0}/other: it was trained, too; give --dense",
        ),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(folder, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert run(*command(folder, *(option.format(folder) for option in options))) == 2
    assert message.format(folder) in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())

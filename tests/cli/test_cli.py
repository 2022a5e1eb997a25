"""Tests of the command line, run as a user runs it."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import run
from conftest import make_base, make_mfn
from fresh_process import Forked
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_mfn import Clamp, MFNForCausalLM, MFNTrainer, __version__
from modeling_mfn.cli.main import main


@pytest.fixture
def folder(tmp_path):
    """Folder with a tiny base checkpoint, its tokenizer and a text."""
    make_base("llama-tied").save_pretrained(tmp_path / "base")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0", unk_token="w0")
    tokenizer.save_pretrained(tmp_path / "base")
    text = " ".join(f"w{3 + (7 * i + i * i) % 90}" for i in range(2000))
    (tmp_path / "text.txt").write_text(text)
    return tmp_path


def converted(folder, *options):
    out = folder / "mfn"
    assert run("convert", folder / "base", out, "--num-features", 64, "--k", 8, *options) == 0
    return out


def test_convert_train_steer(folder, capsys):
    mfn = converted(folder, "--layers", "0,2", "--calibrate-on", folder / "text.txt")
    model = AutoModelForCausalLM.from_pretrained(mfn)
    assert (model.config.layers, model.config.num_features, model.config.k) == ([0, 2], 64, 8)
    assert model.mfn_layers[0].decoder.bias.any()
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    ids = torch.tensor([[13, 18, 75]])
    assert torch.equal(model(ids).logits, base(ids).logits)

    steps = ("--steps", 6, "--window", 16, "--batch-size", 4, "--save-steps", 3)
    assert run("train", mfn, folder / "trained", "--text", folder / "text.txt", *steps) == 0
    trained = AutoModelForCausalLM.from_pretrained(folder / "trained")
    assert trained.config.alpha == 1.0
    record = json.loads((folder / "trained" / "checkpoint-6" / "trainer_state.json").read_text())
    assert record["global_step"] == 6
    assert (
        run("train", mfn, folder / "trained", "--text", folder / "text.txt", *steps[2:], "--steps", 8, "--resume") == 0
    )

    capsys.readouterr()
    steering = ("--set", "L0/5=clamp:9", "--set", "L2/7=ablate", "--max-new-tokens", 5)
    assert run("steer", folder / "trained", "w13 w18 w75", *steering) == 0
    printed = capsys.readouterr().out
    trained = AutoModelForCausalLM.from_pretrained(folder / "trained")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "trained")

    def text():
        generated = trained.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 3:]
        return tokenizer.decode(generated, skip_special_tokens=True)

    without = text()
    from modeling_mfn import Ablate

    with trained.steer({(0, 5): Clamp(9.0), (2, 7): Ablate()}):
        steered = text()
    assert steered not in ("", without)
    lines = [line for line in printed.splitlines() if line.strip()]
    assert lines[lines.index(next(line for line in lines if line.startswith("without"))) + 1] == without
    assert lines[lines.index(next(line for line in lines if line.startswith("steered"))) + 1] == steered


def test_steer_with_a_preset_and_a_condition(folder, capsys):
    mfn = converted(folder, "--alpha", 1)
    model = AutoModelForCausalLM.from_pretrained(mfn)
    ids = torch.tensor([[13, 18, 75]])
    active = int(model(ids, output_codes=True).codes[0].indices[0, 1, 0])
    model.save_preset("loud", {(1, 5): Clamp(9.0)}, positions="generated")
    model.save_pretrained(mfn)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(mfn)
    with model.steer("loud"), model.steer({(2, 7): Clamp(12.0, when=(0, active))}):
        generated = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 3:]
    for options in (("--preset", "loud", "--set", f"L2/7=clamp:12@L0/{active}"), ("--preset", "loud")):
        capsys.readouterr()
        assert run("steer", mfn, "w13 w18 w75", *options, "--max-new-tokens", 5) == 0
        printed = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
        expected = tokenizer.decode(generated, skip_special_tokens=True)
        assert (printed[-1] == expected) == (len(options) == 4)
    assert run("steer", mfn, "w13", "--preset", "quiet") == 2
    assert "no preset 'quiet'; this model has loud" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("steer", "{base}", "w5"), "give --set, --preset, --active or several of them"),
        (("steer", "{base}", "w5", "--set", "L0/5=ablate@7"), "'7' names no feature"),
        (("convert", "{base}", "{out}"), "num_features is None and expansion_factor is None"),
        (("convert", "{base}", "{out}", "--num-features", "8", "--k", "9"), "k is 9; it must be a whole number from 1"),
        (("convert", "{base}", "{out}", "--num-features", "40", "--layers", "0,7"), "layers contains 7"),
        (("convert", "{base}", "{out}", "--num-features", "40", "--layers", "x"), "layers is 'x'"),
        (("convert", "{base}", "{out}", "--num-features", "40", "--alpha", "nan"), "alpha is nan"),
        (("convert", "{base}-none", "{out}", "--num-features", "40"), "is neither a folder nor"),
        (("convert", "./none", "{out}", "--num-features", "40"), "./none is neither a folder nor an id"),
        (("steer", "./none", "w5", "--set", "L0/5=ablate"), "./none is neither a folder nor an id"),
        (("convert", "{base}", "{base}", "--num-features", "40", "--overwrite"), "is the model itself"),
        (("convert", "{base}", "{base}/..", "--num-features", "40"), "exists and is not empty"),
        (("convert", "{base}", "{base}/config.json", "--num-features", "40"), "is a file"),
        (("train", "{mfn}", "{out}", "--text", "{base}/none.txt", "--window", "16"), "none.txt is not a file"),
        (
            ("train", "{mfn}", "{out}", "--text", "{base}/config.json", "--window", "65"),
            "window is 65; the model reads at most 64 tokens (max_position_embeddings)",
        ),
        (
            ("train", "{base}", "{out}", "--text", "{base}/config.json"),
            "is a 'llama' model without MFN layers; convert",
        ),
        (("atlas", "{base}", "{out}", "--text", "{base}/config.json"), "convert it first: mfn convert {base} OUTPUT"),
        (("steer", "{base}", "w5", "--set", "L0/5=ablate"), "convert it first: mfn convert {base} OUTPUT"),
        (("explain", "{base}", "w5"), "convert it first: mfn convert {base} OUTPUT"),
        (("evaluate", "{base}", "--text", "{base}/config.json", "--output", "{out}"), "convert it first: mfn convert"),
        (("convert", "no-such/model", "{out}", "--num-features", "8"), "no-such/model is not a folder, and cannot be"),
        (("steer", "no-such/model", "w5", "--set", "L0/5=ablate"), "no-such/model is not a folder, and cannot be"),
        (("convert", "{base}", "{out}[/x]", "--num-features", "0"), "num_features is 0"),
        (("steer", "{bare}", "w5", "--set", "L0/5=ablate"), "the tokenizer of {bare} cannot be read"),
        (("convert", "{bare}", "{out}", "--num-features", "40"), "the tokenizer of {bare} cannot be read"),
        (("train", "{base}", "{base}", "--text", "{base}/config.json", "--overwrite"), "is the model itself"),
        (("train", "{base}", "{base}/..", "--text", "{base}/config.json"), "exists and is not empty"),
        (("steer", "{base}", "w5", "--set", "L0/5=push:3"), "'L0/5=push:3' is not an intervention"),
        (("steer", "{base}", "w5", "--set", "L0/5=clamp:nan"), "nan"),
        (("steer", "{base}", "w5", "--set", "0/5=ablate"), "'0/5' is not a feature such as L6/1234"),
    ],
)
def test_bad_input_ends_with_one_line_and_leaves_nothing(folder, capsys, arguments, message):
    names = {name: str(folder / name) for name in ("base", "out", "mfn", "bare")}
    if "{mfn}" in arguments:
        converted(folder)
    if "{bare}" in arguments:
        bare = make_base("gpt2-tied")
        (bare if arguments[0] == "convert" else make_mfn(bare)).save_pretrained(folder / "bare")
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run(*(argument.format(**names) for argument in arguments)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mfn: ")]
    assert len(error) == 1
    assert message.format(**names) in error[0]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }
    assert not (folder / "out").exists()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_overwrite_replaces_and_a_failure_keeps_the_old_folder(folder):
    mfn = converted(folder)
    before = contents(folder)
    assert run("convert", folder / "base", mfn, "--num-features", 64, "--k", 99, "--overwrite") == 2
    assert contents(folder) == before
    assert run("convert", folder / "base", mfn, "--num-features", 32, "--k", 8, "--overwrite") == 0
    assert AutoModelForCausalLM.from_pretrained(mfn).config.num_features == 32
    assert {path.name for path in folder.iterdir()} == {"base", "mfn", "text.txt"}


def test_overwrite_deletes_only_what_is_ours(folder, capsys, monkeypatch):
    """No folder with an input, a stranger's file, the current folder or a home is replaced."""
    project, small = folder / "project", ("--num-features", 32, "--k", 8, "--overwrite")
    (project / "models").mkdir(parents=True)
    shutil.move(folder / "base", project / "models" / "base")
    shutil.move(folder / "text.txt", project / "corpus.txt")
    base, text = project / "models" / "base", project / "corpus.txt"
    mfn = project / "models" / "mfn"
    assert run("convert", base, mfn, *small) == 0
    (folder / "elsewhere").symlink_to(project / "models")
    before = contents(folder)
    train = ("--window", 16, "--steps", 1, "--overwrite", "--text", text)
    for command, message in [
        (("convert", base, project / "models", *small), f"contains {base}"),
        (("convert", base, folder / "elsewhere", *small), f"contains {base}"),
        (("train", mfn, project, *train), f"contains {mfn}"),
        (("train", mfn, mfn, *train), "is the model itself"),
        (("convert", base, mfn.parent / "mfn", "--calibrate-on", mfn, *small), "is the model itself, or its text"),
        (("explain", mfn, "w5", "--output", project, "--overwrite"), f"contains {mfn}"),
    ]:
        assert run(*command) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert contents(folder) == before
    other = folder / "other"
    shutil.copytree(mfn, other)
    (other / "checkpoint-3").mkdir()
    for place in ("notes.md", "train.py", "checkpoint-3/notes.md"):
        (other / place).write_text("mine")
        assert run("convert", base, other, *small) == 2
        assert f"other holds {place}, which mfn did not write" in " ".join(capsys.readouterr().err.split())
        (other / place).unlink()
    shutil.copytree(base, folder / "plain")
    assert run("convert", base, folder / "plain", *small) == 2
    assert "shows that mfn wrote it" in " ".join(capsys.readouterr().err.split())
    monkeypatch.chdir(other / "checkpoint-3")
    assert run("convert", base, "..", *small) == 2
    assert "contains the current folder" in " ".join(capsys.readouterr().err.split())
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(other))
    assert run("convert", base, other, *small) == 2
    assert "contains your home folder" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setenv("HOME", str(folder))
    assert run("convert", base, other, *small) == 0
    assert not (other / "checkpoint-3").exists()


def test_a_training_replaces_an_older_model_last(folder, capsys, monkeypatch):
    """A training that fails leaves the older model. It can be resumed, and replaces that model at its end."""
    mfn, out = converted(folder), folder / "out"
    command = ("train", mfn, out, "--text", folder / "text.txt", "--window", 16, "--batch-size", 4, "--save-steps", 1)
    assert run(*command, "--steps", 1) == 0
    before = contents(out)

    def full(self, *args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(MFNForCausalLM, "save_pretrained", full)
        assert run(*command, "--steps", 2, "--overwrite") == 2
    assert "No space left" in capsys.readouterr().err
    assert contents(out) == before
    assert run(*command, "--steps", 2, "--overwrite") == 0
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    with monkeypatch.context() as patched:
        patched.setattr(MFNTrainer, "end_training", full)
        assert run(*command, "--steps", 3, "--overwrite") == 2
    assert not (out / "checkpoint-3").exists()
    out.rename(folder / "moved")
    assert run(*command, "--steps", 1) == 2  # the interrupted training is not taken for this one's later
    assert "out.unfinished holds an interrupted training" in " ".join(capsys.readouterr().err.split())
    (folder / "moved").rename(out)
    assert run(*command, "--steps", 3, "--resume") == 0
    assert (out / "checkpoint-3").exists()
    assert {path.name for path in folder.iterdir()} == {"base", "mfn", "text.txt", "out"}


@pytest.mark.parametrize("verb", ["convert", "train", "atlas", "evaluate", "explain", "export"])
def test_an_output_that_cannot_be_written_is_found_before_the_work(folder, capsys, monkeypatch, verb):
    mfn = converted(folder)
    text, out = ("--text", folder / "text.txt", "--window", 16), folder / "out"
    command = {
        "convert": (folder / "base", out, "--num-features", 64),
        "train": (mfn, out, *text),
        "atlas": (mfn, out, *text),
        "evaluate": (mfn, *text, "--output", out, "--predictions", "P3"),
        "explain": (mfn, "w5", "--output", out),
        "export": (mfn, out),
    }

    def read_only(**kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    def works(*args, **kwargs):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    for model_class in (MFNForCausalLM, AutoModelForCausalLM):
        monkeypatch.setattr(model_class, "from_pretrained", works)
    assert run(verb, *command[verb]) == 2
    assert "out cannot take 1 bytes: Read-only file system" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_damaged_weights_are_named(folder, capsys):
    mfn = converted(folder)
    weights = mfn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert run("steer", mfn, "w5", "--set", "L0/5=ablate") == 2
    assert f"weights of {mfn} are truncated" in " ".join(capsys.readouterr().err.split())


def test_too_little_text(folder, capsys):
    mfn = converted(folder)
    (folder / "short.txt").write_text("w5 w6")
    (folder / "blank.txt").write_text(" \n")
    assert run("train", mfn, folder / "out", "--text", folder / "short.txt", "--window", 64) == 2
    assert "the text has 3 tokens, less than one window of 64" in capsys.readouterr().err
    assert run("train", mfn, folder / "out", "--text", folder / "blank.txt", "--window", 64) == 2
    assert "no text in" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "verb", ["convert", "train", "atlas", "steer", "explain", "explore", "evaluate", "export", "push", "unwrap", "demo"]
)
def test_every_verb_has_help_with_an_example(verb, capsys):
    assert run(verb, "--help") == 0
    assert f"Example: mfn {verb}" in capsys.readouterr().out


COMMAND = "import runpy; runpy.run_module('modeling_mfn.cli', run_name='__main__')"


def test_a_traceback_is_shown_only_with_debug(folder):
    for options in ((), ("--debug",)):
        command = (*options, "convert", folder / "base", folder / "out")
        process = Forked(COMMAND, folder, *command, output=folder / "output")
        assert process.wait() == (1 if options else 2)
        printed = process.output.read_text()
        assert ("Traceback" in printed) == bool(options)
        assert "num_features is None" in printed
    assert run("convert", "only-a-base") == 2


HEAVY = ("torch", "transformers", "datasets", "pyarrow", "pandas", "numpy", "sklearn", "scipy", "matplotlib", "peft")
HELP = f"""
import sys
from modeling_mfn.cli.main import main

try:
    main(["--help"])
finally:
    loaded = [name for name in {HEAVY} if name in sys.modules]
    assert not loaded, loaded
"""


def test_help_imports_no_heavy_package():
    result = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
    assert "convert" in result.stdout
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("option", [("--dtype", "fp16"), ("--codes", "both")])
def test_an_option_of_another_kind_is_a_usage_error(folder, capsys, option):
    assert run("convert", folder / "base", folder / "out", "--num-features", 8, *option) == 2
    assert "Invalid value" in capsys.readouterr().err
    assert run("train", folder / "base", folder / "out", "--text", folder / "text.txt", "--steps", 0) == 2
    assert "--steps" in capsys.readouterr().err


def test_names_with_markup_are_shown_as_they_are(folder, capsys):
    out = folder / "out[" / "x]"
    assert run("convert", folder / "base", out, "--num-features", 64, "--k", 8) == 0
    # a long path may end a line anywhere
    assert "out[/x]:3MFNlayers" in "".join(capsys.readouterr().out.split())


class ArrowError(Exception):
    """Error of a library that reads files."""

    __module__ = "pyarrow.lib"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a"), 2), (OSError("a"), 2), (MemoryError(), 2), (RecursionError("a"), 2), (ArrowError("a\nb"), 2),
        (SafetensorError("a"), 2), (torch.OutOfMemoryError("a"), 2), (KeyboardInterrupt(), 130), (SystemExit(130), 130),
        (TypeError("[/x] a"), 1), (KeyError("a"), 1), (RuntimeError("a"), 1),
    ],
)  # fmt: skip
def test_a_failure_is_one_line_and_a_bug_has_a_log(monkeypatch, capsys, error, code):
    def fails(args):
        raise error

    monkeypatch.setattr("modeling_mfn.cli.main.app", fails)
    assert run("steer") == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mfn: ")
    if code == 1:
        assert type(error).__name__ in line
        log = Path(re.search(r"(\S+\.log) has the traceback", line)[1])
        assert "in fails" in log.read_text()
        log.unlink()
    with pytest.raises(type(error) if code != 130 else SystemExit):
        main(["--debug", "steer"])


def test_version_completion_and_the_package_as_a_command():
    for module in ("modeling_mfn", "modeling_mfn.cli"):
        command = [sys.executable, "-m", module, "--version"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"mfn {__version__}\n"
    environment = os.environ | {"_MFN_COMPLETE": "complete_bash", "COMP_WORDS": "mfn st", "COMP_CWORD": "1"}
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'mfn'; from modeling_mfn.cli.main import main; main()"]
    completed = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert completed.stdout.split() == ["steer"], completed.stderr

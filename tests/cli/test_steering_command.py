"""Tests of `mfn steer`: by feature, by label, at positions, and on text that attacks the terminal."""

import json
import re
import shutil

import planted
import pytest
import torch
from command_line import run
from conftest import make_base, make_mfn
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_mfn import Ablate, Clamp, FeatureAtlas, MFNForCausalLM, Scale

PROMPT = "king dog bread w7"
NEW = 6


@pytest.fixture(scope="module")
def planted_model():
    model = planted.model()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def folder(planted_model, tmp_path_factory):
    """Folder of a model whose atlas has three labelled features."""
    folder = tmp_path_factory.mktemp("planted")
    planted_model.save_pretrained(folder)
    planted.tokenizer().save_pretrained(folder)
    atlas = FeatureAtlas.build(planted_model, planted.tokenizer(), planted.text(), progress=False)
    for feature, label in ((planted.ANIMAL, "animals"), (planted.MEMORY, "animals"), (planted.KINGS, "a=b@c \x1b[2J")):
        atlas.label((0, feature), label)
    atlas.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def typical(planted_model):
    """Mean activation of each feature over the tokens of the atlas on which it is active."""
    ids = torch.tensor(planted.text()["input_ids"])
    with torch.no_grad():
        dense = planted_model(ids, output_codes=True).codes[0].to_dense().flatten(0, 1).double()
    return (dense.sum(0) / (dense > 0).sum(0)).tolist()


def generated(model, interventions, positions="all"):
    tokenizer = planted.tokenizer()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with model.steer(interventions, positions):
        ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def steered(capsys, folder, *options, prompt=PROMPT):
    """Text printed under each of the two headings."""
    capsys.readouterr()
    assert run("steer", folder, prompt, *options, "--max-new-tokens", NEW) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    _, without, steered = re.split(r"(?m)^(?:without|steered) ─+\n", printed)
    return without.removesuffix("\n"), steered.removesuffix("\n")


def by_label(typical):
    memory, animal, kings = (0, planted.MEMORY), (0, planted.ANIMAL), (0, planted.KINGS)
    strong = {feature: Clamp(3 * typical[feature[1]]) for feature in (memory, animal)}
    return {
        "a label is all its features, in units of their own": (["Animals=clamp:3"], strong),
        "a feature's own units, and its own intervention": (
            ["animals=clamp:3", "L0/0=clamp:-9"], strong | {animal: Clamp(-9.0)},
        ),
        "a condition": (["animals=clamp:3@L0/3"], {f: Clamp(c.value, when=kings) for f, c in strong.items()}),
        "what has no unit": (["animals=scale:-2"], {memory: Scale(-2.0), animal: Scale(-2.0)}),
        "signs in a label": (["a=b@c \x1b[2J=ablate"], {kings: Ablate()}),
    }  # fmt: skip


@pytest.mark.parametrize("case", by_label([0.0] * 9))
def test_by_label(planted_model, folder, typical, capsys, case):
    settings, interventions = by_label(typical)[case]
    expected, plain = generated(planted_model, interventions), generated(planted_model, {})
    assert expected != plain
    assert steered(capsys, folder, *(word for each in settings for word in ("--set", each))) == (plain, expected)


def test_a_label_leaves_out_what_was_pruned_since(planted_model, folder, typical, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "pruned")
    pruned = MFNForCausalLM.from_pretrained(folder)
    pruned.prune_features(0, [planted.MEMORY])
    pruned.save_pretrained(tmp_path / "pruned")
    animals = {(0, planted.ANIMAL): Clamp(3 * typical[planted.ANIMAL])}
    expected = generated(pruned, {}), generated(pruned, animals)
    assert steered(capsys, tmp_path / "pruned", "--set", "animals=clamp:3") == expected


def test_the_features_of_a_label_are_named(folder, capsys):
    assert run("steer", folder, PROMPT, "--set", "animals=clamp:1", "--set", "a=b@c \x1b[2J=ablate") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("animals is L0/0, L0/1\na=b@c \\x1b[2J is L0/3\n")


def test_positions(planted_model, folder, capsys):
    texts = {}
    for positions in ("all", "prompt", "generated"):
        texts[positions] = generated(planted_model, {(0, 0): Clamp(60.0)}, positions)
        options = ("--set", "L0/0=clamp:60", "--positions", positions)
        assert steered(capsys, folder, *options)[1] == texts[positions]
    assert len({*texts.values(), generated(planted_model, {})}) == 4
    assert run("steer", folder, PROMPT, "--set", "L0/0=clamp:60", "--positions", "first") == 2


def test_positions_take_the_place_of_the_preset_s(planted_model, folder, tmp_path, capsys):
    planted_model.save_preset("animal", {(0, 0): Clamp(60.0)}, positions="prompt")
    planted_model.save_pretrained(tmp_path)
    planted_model.delete_preset("animal")
    planted.tokenizer().save_pretrained(tmp_path)
    for options, positions in (((), "prompt"), (("--positions", "generated"), "generated")):
        expected = generated(planted_model, {(0, 0): Clamp(60.0)}, positions)
        assert steered(capsys, tmp_path, "--preset", "animal", *options)[1] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("animal=ablate",), "no feature is labelled 'animal'; there are 'animals'"),
        (("x\x1b[2J=ablate",), r"no feature is labelled 'x\x1b[2J'"),
        (("zebra=ablate",), r"the most common labels are 'animals', 'a=b@c \x1b[2J'"),
        (("animals=push:3",), "'animals=push:3' is not an intervention"),
        (("animals=clamp:x",), "'animals=clamp:x' is not an intervention"),
        (("=ablate",), "'=ablate' is not an intervention"),
        (("animals=ablate", "animals=clamp:1"), "'animals' is set twice"),
        (("L0/1=ablate", "L0/01=clamp:1"), "'L0/01' is set twice"),
        (("Animals=ablate", "animals=clamp:1"), "is meant by 'Animals' and by 'animals'"),
        (("L7/1=ablate",), "block 7 has no MFN layer"),
    ],
)
def test_bad_settings_end_with_one_line(folder, capsys, arguments, message):
    assert run("steer", folder, PROMPT, *(word for each in arguments for word in ("--set", each))) == 2
    printed = capsys.readouterr()
    (line,) = (line for line in printed.err.splitlines() if line.startswith("mfn: "))
    assert message in line
    assert "\x1b" not in printed.err + printed.out


def test_a_label_needs_an_atlas_with_labels(planted_model, tmp_path, capsys):
    planted_model.save_pretrained(tmp_path)
    planted.tokenizer().save_pretrained(tmp_path)
    assert run("steer", tmp_path, PROMPT, "--set", "animals=ablate") == 2
    assert f"'animals' is not a feature such as L6/1234, and {tmp_path} has no atlas" in capsys.readouterr().err
    FeatureAtlas.build(planted_model, planted.tokenizer(), planted.text(), progress=False).save_pretrained(tmp_path)
    assert run("steer", tmp_path, PROMPT, "--set", "animals=ablate") == 2
    assert "the atlas has no labels" in capsys.readouterr().err


def test_prompts_that_no_model_can_go_on_from(folder, tmp_path, capsys):
    assert run("steer", folder, "", "--set", "L0/0=clamp:60") == 2
    assert "the prompt has no tokens, and the tokenizer adds none" in capsys.readouterr().err
    assert run("steer", folder, "king \udcff", "--set", "L0/0=clamp:60") == 2  # a byte that is not UTF-8
    assert "it must be text, in UTF-8" in capsys.readouterr().err
    long = " ".join(["king"] * 60)
    assert run("steer", folder, long, "--set", "L0/0=clamp:60", "--max-new-tokens", 6) == 2
    assert "the prompt has 60 tokens and --max-new-tokens is 6; the model reads at most 64" in capsys.readouterr().err
    assert run("steer", folder, long, "--set", "L0/0=clamp:60", "--max-new-tokens", 5) == 0

    planted.model().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    beginning = ("\u2581w1", 1)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "\u2581w1 $A", special_tokens=[beginning]
    )
    tokenizer.save_pretrained(tmp_path)
    assert run("steer", tmp_path, "", "--set", "L0/0=clamp:60") == 0


def test_what_the_model_says_cannot_act_on_the_terminal(tmp_path, capsys):
    """All tokens of the vocabulary but three contain an escape sequence."""
    names = [f"w{number}" for number in range(3)]
    names += [f"\x1b[{number}J\r\x07[/red]:warning:\n" for number in range(3, 96)]
    words = Tokenizer(WordLevel({name: place for place, name in enumerate(names)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", unk_token="w0").save_pretrained(tmp_path)
    model = make_mfn(make_base("llama-tied"))
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    for text in steered(capsys, tmp_path, "--set", "L0/5=clamp:60", prompt="w1"):
        assert text.isascii()
        assert set(text) >= set("\\x1b[J:warning:/red]\n")
        assert all(line.isprintable() for line in text.split("\n"))
        assert text.count("[/red]:warning:\n") >= NEW - 1


def test_a_preset_is_saved_in_the_folder_and_made_active(folder, planted_model, tmp_path, capsys):
    def config():
        return json.loads((tmp_path / "model" / "config.json").read_text())

    shutil.copytree(folder, tmp_path / "model")
    before = config()
    interventions = {(0, planted.ANIMAL): Clamp(40.0)}
    setting = f"L0/{planted.ANIMAL}=clamp:40"
    usual = generated(planted_model, {}), generated(planted_model, interventions)
    assert usual[0] != usual[1]
    saving = ["--set", setting, "--save-preset", "wild", "--active", "wild"]
    assert steered(capsys, tmp_path / "model", *saving) == usual
    loaded = MFNForCausalLM.from_pretrained(tmp_path / "model")
    assert generated(loaded, {}) == usual[1]
    assert config() == before | {"active_preset": "wild", "steering_presets": loaded.config.steering_presets}
    assert steered(capsys, tmp_path / "model", "--preset", "wild") == usual
    assert steered(capsys, tmp_path / "model", "--active", "wild") == usual
    assert steered(capsys, tmp_path / "model", "--active", "") == (usual[0], usual[0])
    assert generated(MFNForCausalLM.from_pretrained(tmp_path / "model"), {}) == usual[0]
    for options, message in (
        (["--active", "tame"], "active_preset is 'tame'; it must be null or a preset: wild"),
        (["--set", setting, "--save-preset", "wild"], "there is a preset 'wild' already"),
        (["--preset", "wild", "--save-preset", "more"], "there are none"),
    ):
        written = config()
        assert run("steer", tmp_path / "model", PROMPT, *options) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert config() == written

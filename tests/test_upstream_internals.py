"""Private parts of other libraries that the package uses, as listed on a page of the documents."""

import inspect
import re
from pathlib import Path
from pkgutil import resolve_name

import peft
import pytest
import torch
import transformers

from modeling_mfn import MFNConfig, MFNForCausalLM, MFNModel, MFNTrainer, MFNTrainingArguments
from modeling_mfn.cli.served_models import ServedModels
from modeling_mfn.model.mfn_layer import MFNLayer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "developer" / "upstream_internals.md"
ROWS = re.findall(r"^\| `(.+?)` \| (.+?) \| (.+?) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def names():
    """Objects that expressions on the page refer to."""
    model = transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
    settings = peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["mlp"])
    adapted = peft.get_peft_model(transformers.GPT2Model(model.config), settings)
    return {"model": model, "adapted": adapted}


@pytest.mark.parametrize(("internal", "where", "why"), ROWS, ids=[row[0] for row in ROWS])
def test_an_internal_is_there(internal, where, why, names):
    for file in re.findall(r"`(.+?)`", where):
        assert (ROOT / "modeling_mfn" / file).is_file()
    try:
        eval(internal, names) if internal.split(".")[0] in names else resolve_name(internal)
    except (AttributeError, ImportError) as error:
        pytest.fail(f"{internal} is gone. {where} needs it: {why}. ({error})")


def test_the_key_of_extra_state_is_torchs():
    from modeling_mfn.model.peft_copies import SETTINGS

    assert SETTINGS == torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX


def overrides():
    """Yields our methods that override a private method of another library: (name, ours, theirs)."""
    for ours in (MFNConfig, MFNForCausalLM, MFNModel, MFNLayer, MFNTrainer, MFNTrainingArguments, ServedModels):
        mine = [each for each in ours.__mro__ if each.__module__.startswith("modeling_mfn.")]
        others = [each for each in ours.__mro__ if each not in mine]
        for name in {name for each in mine for name in vars(each)}:
            other = next((vars(each)[name] for each in others if name in vars(each)), None)
            if re.fullmatch(r"_[a-z]\w*", name) and inspect.isfunction(other):
                yield name, getattr(ours, name), other


def test_private_methods_that_we_override_are_listed_and_called_as_before():
    """Overrides take the parameters of the original method, by the same names or with a catch-all."""
    listed = " ".join(row[0] for row in ROWS)
    found = list(overrides())
    assert {"_adjust_bias", "_determine_best_metric", "_load_from_state_dict"} <= {name for name, _, _ in found}
    for name, ours, other in found:
        assert f".{name}" in listed, f"{name} is overridden, but not on {PAGE.name}"
        mine, theirs = inspect.signature(ours).parameters, inspect.signature(other).parameters
        if not any(each.kind is each.VAR_POSITIONAL for each in mine.values()):
            assert list(mine) == list(theirs), f"{name} takes {list(mine)}, is called with {list(theirs)}"

"""The mixin over the trainers of TRL: its losses, schedules and norms beside theirs (`make test-trl`)."""

import copy
from dataclasses import dataclass

import pytest
import torch
from conftest import make_base, make_mfn
from datasets import Dataset
from peft import LoraConfig
from tokenizers_for_tests import make_tokenizer
from trainings import history

from modeling_mfn import Clamp, MFNForCausalLM, MFNTrainerMixin, MFNTrainingArguments
from modeling_mfn.training.record import read_record
from modeling_mfn.training.statistics import STATE_FILE

trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

WORDS = ["the king rides", "a queen sings to the prince", "the old sword is of the king", "a prince has a sword"]
DATA = {
    "SFT": {"text": WORDS * 4},
    "DPO": {"prompt": WORDS * 4, "chosen": [" and sings"] * 16, "rejected": [" of the the"] * 16},
    "GRPO": {"prompt": WORDS * 4},
}
KTO = {"prompt": WORDS * 2, "completion": [" and sings", " has a king", " the", " of"] * 2, "label": [True, False] * 4}


class MFNSFTTrainer(MFNTrainerMixin, trl.SFTTrainer): ...


class MFNDPOTrainer(MFNTrainerMixin, trl.DPOTrainer): ...


class MFNGRPOTrainer(MFNTrainerMixin, trl.GRPOTrainer): ...


class MFNKTOTrainer(MFNTrainerMixin, trl.KTOTrainer): ...


@dataclass
class MFNSFTConfig(trl.SFTConfig, MFNTrainingArguments): ...


@dataclass
class MFNDPOConfig(trl.DPOConfig, MFNTrainingArguments): ...


@dataclass
class MFNGRPOConfig(trl.GRPOConfig, MFNTrainingArguments): ...


@dataclass
class MFNKTOConfig(trl.KTOConfig, MFNTrainingArguments): ...


TRAINERS = {
    "SFT": (MFNSFTTrainer, MFNSFTConfig, {}),
    "DPO": (MFNDPOTrainer, MFNDPOConfig, {}),
    "GRPO": (MFNGRPOTrainer, MFNGRPOConfig, {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}),
}
"""Name -> trainer, config, and settings of the config."""


def lengths(completions, **columns):
    return [len(each) for each in completions]


def run(kind, folder, trainer_class=None, peft_config=None, **settings):
    ours, config_class, own = TRAINERS[kind]
    make_mfn(make_base("llama-tied"), alpha=0.0, k=6).save_pretrained(folder / "model")
    defaults = {
        "lambda_recon": 1.0,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    trainer = (trainer_class or ours)(
        model=MFNForCausalLM.from_pretrained(folder / "model"),  # where DPO and GRPO find their reference
        args=config_class(output_dir=str(folder / "out"), **(defaults | own | settings)),
        train_dataset=Dataset.from_dict(DATA[kind]),
        eval_dataset=Dataset.from_dict(DATA[kind]),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
        **({"reward_funcs": lengths} if kind == "GRPO" else {}),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_trainer_s_own_loss_is_as_without_the_mixin(kind, tmp_path):
    """At alpha 0 no gradient of a feature reaches the backbone, so that it learns what it learns from TRL alone."""
    settings = {"alpha_end": 0.0, "max_grad_norm": 0.0}
    plain = run(kind, tmp_path / "plain", getattr(trl, f"{kind}Trainer"), **settings)
    ours = run(kind, tmp_path / "ours", **settings)
    assert history(ours, "util_loss") == pytest.approx(history(plain, "loss"), rel=1e-4, abs=1e-6)
    for name, weight in plain.model.named_parameters():
        moved = not torch.allclose(ours.model.get_parameter(name), weight, atol=1e-5)
        assert moved == (".mfn." in name), name


@pytest.mark.parametrize("kind", TRAINERS)
def test_schedules_norms_and_records_are_kept(kind, tmp_path):
    settings = {"lambda_stab": 0.5, "stability_pass": "model", "save_strategy": "steps", "save_steps": 3}
    trainer = run(kind, tmp_path, alpha_anneal=1.0, **settings)
    assert history(trainer, "alpha") == pytest.approx([step / 6 for step in range(1, 7)])
    for entry in trainer.state.log_history[:6]:
        features = entry["recon_loss"] + entry["aux_loss"] / 32 + entry["stab_loss"] / 2
        assert entry["loss"] == pytest.approx(3 * features + entry["util_loss"], rel=1e-4)
    for layer in trainer.model.mfn_layers.values():
        torch.testing.assert_close(layer.decoder.weight.norm(dim=-1), torch.ones(80), atol=1e-6, rtol=0)
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert (checkpoint / STATE_FILE).is_file()
    assert read_record(checkpoint).alpha == MFNForCausalLM.from_pretrained(checkpoint).config.alpha == 0.5
    evaluated = trainer.evaluate()
    features = evaluated["eval_recon_loss"] + evaluated["eval_stab_loss"] / 2
    assert evaluated["eval_loss"] == pytest.approx(3 * features + evaluated["eval_util_loss"])


@pytest.mark.parametrize("kind", TRAINERS)
def test_adapters_are_trained_against_the_model_without_them(kind, tmp_path):
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["mfn"], task_type="CAUSAL_LM")
    trainer = run(kind, tmp_path, peft_config=lora, alpha_anneal=1.0)
    assert history(trainer, "alpha")[-1] == 1.0
    assert trainer.model.config.alpha == 1.0
    with trainer.model.disable_adapter():
        assert trainer.model.config.alpha == 0.0
    for layer in trainer.model.mfn_layers.values():
        torch.testing.assert_close(layer.decoder.weight.norm(dim=-1), torch.ones(80), atol=1e-6, rtol=0)


def test_a_config_of_trl_alone_is_refused(tmp_path):
    model = make_mfn(make_base("llama-tied"))
    data = Dataset.from_dict(DATA["SFT"])
    args = trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(ValueError, match="args is SFTConfig; MFNSFTTrainer takes MFNTrainingArguments"):
        MFNSFTTrainer(model, args, train_dataset=data, processing_class=make_tokenizer())


def test_a_reference_that_is_loaded_with_an_active_preset_is_refused(tmp_path):
    model = make_mfn(make_base("llama-tied"))
    model.save_preset("calm", {"L0/5": Clamp(6.0)})
    model.config.active_preset = "calm"
    model.save_pretrained(tmp_path)
    model = MFNForCausalLM.from_pretrained(tmp_path)
    model.config.active_preset = None
    args = MFNDPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[])
    data = Dataset.from_dict(DATA["DPO"])
    with pytest.raises(ValueError, match="active_preset of the reference model is 'calm'"):
        MFNDPOTrainer(model, args=args, train_dataset=data, processing_class=make_tokenizer())


def test_an_evaluation_of_kto_measures_its_rows_and_not_those_of_the_kl_term(tmp_path):
    model = make_mfn(make_base("llama-tied"), k=6)
    args = MFNKTOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=4, disable_tqdm=True
    )
    reference, data = copy.deepcopy(model), Dataset.from_dict(KTO)
    given = {"train_dataset": data, "eval_dataset": data, "processing_class": make_tokenizer()}
    trainer = MFNKTOTrainer(model, ref_model=reference, args=args, **given)
    found = trainer.evaluate()
    spreads = {}
    for kind in ("", "KL_"):
        codes = []
        for batch in trainer.get_eval_dataloader():
            mask = batch[f"{kind}attention_mask"]
            out = model(batch[f"{kind}input_ids"], attention_mask=mask, output_codes=True)
            codes.append(torch.stack([code.to_dense()[mask.bool()] > 0 for code in out.codes.values()], 1))
        spreads[kind] = torch.cat(codes).float().mean(0).std(-1).mean().item()
    assert spreads["KL_"] != pytest.approx(spreads[""], rel=1e-3)
    assert found["eval_firing_rate_std"] == pytest.approx(spreads[""], rel=1e-5)

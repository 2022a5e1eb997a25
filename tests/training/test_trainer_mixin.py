"""`MFNTrainerMixin` over trainers of one's own: losses, schedules, norms and checkpoints are those of `MFNTrainer`."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import make_base, make_mfn
from trainings import arguments, history, rows
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

from modeling_mfn import Clamp, MFNForCausalLM, MFNTrainer, MFNTrainerMixin, MFNTrainingArguments
from modeling_mfn.model import unguided_training
from modeling_mfn.training.record import read_record
from modeling_mfn.training.statistics import STATE_FILE

FIGURES = ("eval_util_loss", "eval_recon_loss", "eval_explained_variance")
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


class Plain(MFNTrainerMixin, Trainer):
    pass


class OwnLoss(Trainer):
    """Computes the next-token loss by hand, between passes without gradients."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            self.model(inputs["input_ids"])
        outputs = model(inputs["input_ids"])
        with torch.no_grad():
            model(**inputs)
        loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


class MixedOwnLoss(MFNTrainerMixin, OwnLoss):
    pass


class Modified(Trainer):
    """Takes whatever the Trainer gives by name, as many examples do."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


class MixedModified(MFNTrainerMixin, Modified):
    pass


class MFNModified(MFNTrainer, Modified):
    pass


def test_a_trainer_with_a_loss_is_not_named_before_the_mixin():
    for ours in (MFNTrainerMixin, MFNTrainer, Plain):
        with pytest.raises(TypeError, match="Wrong names OwnLoss before MFNTrainerMixin, whose losses would be lost"):

            class Wrong(OwnLoss, ours):
                pass

    class WithoutLoss(Seq2SeqTrainer, MFNTrainerMixin):
        pass

    class Own(MixedOwnLoss):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)


def run(trainer_class, family, folder, **settings):
    model = make_mfn(make_base(family, **NO_DROPOUT), alpha=0.0, k=6)
    defaults = {"max_steps": 6, "gradient_accumulation_steps": 2, "alpha_anneal": 1.0, "lambda_rate": 0.1}
    args = arguments(folder, **(defaults | settings))
    trainer = trainer_class(model, args, train_dataset=rows(64), eval_dataset=rows(16, seed=1))
    trainer.train()
    return trainer


@pytest.mark.halved
@pytest.mark.parametrize("family", ["llama-tied", "gpt2-tied"])
@pytest.mark.parametrize("mixed", [Plain, MixedOwnLoss, MixedModified, MFNModified])
def test_a_trainer_with_the_mixin_trains_as_mfn_trainer_does(mixed, family, tmp_path):
    settings = {"lambda_stab": 0.5, "stability_pass": "model", "save_strategy": "steps", "save_steps": 3}
    ours = run(mixed, family, tmp_path / "ours", **settings)
    theirs = run(MFNTrainer, family, tmp_path / "theirs", **settings)
    for name in ("loss", "util_loss", "recon_loss", "rate_loss", "stab_loss", "alpha", "explained_variance"):
        assert history(ours, name) == pytest.approx(history(theirs, name), rel=1e-4), name
    for name, weight in theirs.model.named_parameters():
        torch.testing.assert_close(ours.model.get_parameter(name), weight, atol=1e-4, rtol=0)
    for layer in ours.model.mfn_layers.values():
        torch.testing.assert_close(layer.decoder.weight.norm(dim=-1), torch.ones(80), atol=1e-6, rtol=0)
    checkpoint = tmp_path / "ours" / "checkpoint-3"
    assert (checkpoint / STATE_FILE).is_file()
    saved = MFNForCausalLM.from_pretrained(checkpoint)
    assert read_record(checkpoint).alpha == saved.config.alpha == 0.5
    assert saved.features_digest != ours.model.features_digest
    found, expected = ours.evaluate(), theirs.evaluate()
    for name in ("util_loss", "recon_loss", "rate_loss", "explained_variance"):
        assert found[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-3), name


class Twice(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss + model(**inputs).loss


class Never(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model.get_input_embeddings()(inputs["input_ids"]).square().mean()


class MixedTwice(MFNTrainerMixin, Twice):
    pass


class MixedNever(MFNTrainerMixin, Never):
    pass


@pytest.mark.parametrize(("mixed", "found"), [(MixedTwice, "ran two"), (MixedNever, "ran no")])
def test_a_loss_that_is_not_of_one_pass_is_refused_and_leaves_no_hooks(mixed, found, tmp_path):
    with pytest.raises(ValueError, match=f"{found} forward pass") as caught:
        run(mixed, "llama-tied", tmp_path)
    assert "there must be one" in str(caught.value)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2-tied"])
@pytest.mark.parametrize("mixed", [Plain, MixedOwnLoss])
def test_an_evaluation_without_labels_measures_the_features(mixed, family, tmp_path):
    model, data = make_mfn(make_base(family), alpha=0.5, k=6), rows(16, padded=True).remove_columns("labels")
    settings = {"lambda_rate": 0.1, "lambda_stab": 0.5, "stability_pass": "model", "per_device_eval_batch_size": 4}
    found, expected = (
        trainer(model, arguments(tmp_path, **settings), eval_dataset=data).evaluate() for trainer in (mixed, MFNTrainer)
    )
    assert "eval_util_loss" not in found
    for name in ("eval_loss", "eval_recon_loss", "eval_rate_loss", "eval_explained_variance", "eval_dead_share"):
        assert found[name] == pytest.approx(expected[name]), name
    assert "eval_stab_loss" in found


class OtherRows(OwnLoss):
    """Runs the model on other rows first, as KTO does for its KL term."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        with torch.no_grad():
            model(inputs["input_ids"].flip(1))
        return super().compute_loss(model, inputs, *args, **kwargs)


class MixedOtherRows(MFNTrainerMixin, OtherRows):
    pass


def test_an_evaluation_measures_the_rows_of_its_batch(tmp_path):
    model, data = make_mfn(make_base("llama-tied"), k=6), rows(16)
    found, expected = (
        trainer(model, arguments(tmp_path), eval_dataset=data).evaluate() for trainer in (MixedOtherRows, MFNTrainer)
    )
    for name in FIGURES:
        assert found[name] == pytest.approx(expected[name]), name


GIVEN = {
    "outputs": lambda outputs: outputs,
    "dict": dict,
    "tuple": lambda outputs: (outputs.loss, outputs.logits, outputs.reconstructions),
    "nested": lambda outputs: {"loss": outputs.loss, "inner": [outputs.reconstructions, {"logits": outputs.logits}]},
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_predictions_lack_the_inputs_of_the_feature_losses(given, tmp_path):
    """A trainer may give outputs in any form; the loss is the first of them."""

    class Given(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (outputs.loss, given(outputs)) if return_outputs else outputs.loss

    class MixedGiven(MFNTrainerMixin, Given):
        pass

    model, args = make_mfn(make_base("llama-tied")), arguments(tmp_path, per_device_eval_batch_size=3)
    found, expected = (trainer(model, args).predict(rows(8)).predictions for trainer in (MixedGiven, MFNTrainer))
    while not hasattr(found, "shape"):
        (found,) = found.values() if isinstance(found, dict) else found
    assert found == pytest.approx(expected)


class WithReference(Trainer):
    """Loads its reference from a folder, as trainers of TRL do."""

    def __init__(self, model, args, *, folder, **kwargs):
        super().__init__(model, args, **kwargs)
        self.ref_model = MFNForCausalLM.from_pretrained(folder)


class MixedWithReference(MFNTrainerMixin, WithReference):
    pass


def test_a_preset_that_becomes_active_steers_no_training_reference_or_evaluation(tmp_path):
    model = make_mfn(make_base("llama-tied"))
    model.save_preset("calm", {"L0/5": Clamp(20.0)})
    model.config.active_preset = "calm"
    model.save_pretrained(tmp_path / "model")
    model.config.active_preset = None
    with pytest.raises(ValueError, match=r"of the reference model is 'calm'.* set config.active_preset of the model"):
        MixedWithReference(model, arguments(tmp_path), folder=tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    data = {"train_dataset": rows(16), "eval_dataset": rows(8)}
    trainer = MixedWithReference(model, arguments(tmp_path, max_steps=1), folder=tmp_path / "model", **data)
    before, logits = trainer.evaluate(), trainer.predict(rows(8)).predictions
    for changed in (trainer.ref_model, model):
        changed.config.active_preset = "calm"
        with pytest.raises(ValueError, match="must not be steered"):
            trainer.train()
        if changed is model:
            after = trainer.evaluate()
            assert {name: after[name] for name in FIGURES} == {name: before[name] for name in FIGURES}
            assert (trainer.predict(rows(8)).predictions == logits).all()
            assert model.config.active_preset == "calm"
        changed.config.active_preset = None
    trainer.train()


def test_options_that_need_the_loss_of_mfn_trainer_are_refused(tmp_path):
    for settings in ({"util_target": "kl"}, {"lambda_named": 1.0, "named_features": ["L0/0"]}):
        with pytest.raises(ValueError, match="Plain has a loss of its own, and it must be"):
            Plain(make_mfn(make_base("llama-tied")), arguments(tmp_path, **settings))
    with pytest.raises(ValueError, match="args is TrainingArguments; Plain takes MFNTrainingArguments"):
        Plain(make_mfn(make_base("llama-tied")), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))


def test_arguments_mix_with_those_of_another_trainer_and_keep_its_defaults(tmp_path):
    @dataclass
    class Config(TrainingArguments):
        learning_rate: float = 0.5
        beta: float = 0.1

    @dataclass
    class Mixed(Config, MFNTrainingArguments):
        pass

    args = Mixed(str(tmp_path), lambda_rate=0.25, beta=0.2, use_cpu=True)
    assert (args.learning_rate, args.beta, args.lambda_rate) == (0.5, 0.2, 0.25)
    with pytest.raises(ValueError, match="rho is 2"):
        Mixed(str(tmp_path), rho=2.0, use_cpu=True)
    with pytest.raises(TypeError, match="names MFNTrainingArguments before Config, whose defaults would be lost"):

        @dataclass
        class Wrong(MFNTrainingArguments, Config):
            pass


@pytest.mark.halved
@pytest.mark.parametrize("family", ["llama-tied", "gpt2-tied"])
def test_a_plain_trainer_is_told_what_it_does_not_keep(family, tmp_path, caplog):
    """At alpha 0 nothing is learnt, and elsewhere directions change length. A loop that keeps norms hears nothing."""
    args = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )

    def told():
        return [each.getMessage() for each in caplog.records if each.name == unguided_training.__name__]

    for alpha, warning in ((0.0, "and learn nothing"), (1.0, "of its norm. Train with a Trainer that keeps norms")):
        caplog.clear()
        unguided_training.logger.warning_once.cache_clear()
        model = make_mfn(make_base(family), alpha=alpha)
        model.save_pretrained(tmp_path / "before")
        assert not told()
        Trainer(model, args, train_dataset=rows(16)).train()
        model.save_pretrained(tmp_path / "after")
        assert [warning in each for each in told()] == [True]
    caplog.clear()
    for layer in model.mfn_layers.values():
        layer.normalise_directions()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "after")
    run(Plain, family, tmp_path, lambda_rate=0.0).save_model()
    assert not told()

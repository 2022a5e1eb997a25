"""Training: the objective, accumulation, schedules, exact resume, and unit-norm directions."""

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import make_base, make_mfn
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers_for_tests import make_tokenizer
from trainings import arguments, history, rows, train
from transformers import EarlyStoppingCallback

from modeling_mfn import MFNForCausalLM, MFNTrainer, MFNTrainingArguments
from modeling_mfn.training.activation_cache import ActivationCache, CachedResiduals
from modeling_mfn.training.arguments import without_removed
from modeling_mfn.training.record import find_complete_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.mark.halved
@pytest.mark.parametrize("family", ["llama-tied", "gpt2-tied"])
def test_training_lowers_the_loss_and_moves_alpha_and_k_on_schedule(family, tmp_path):
    model = make_mfn(make_base(family), alpha=0.0, k=12)
    trainer = train(tmp_path, model, max_steps=80, k_start=12, k_end=4)
    alpha = history(trainer, "alpha")
    untrained = MFNTrainer(make_mfn(make_base(family), k=4), arguments(tmp_path), eval_dataset=rows(64)).evaluate()
    trained = trainer.evaluate(rows(64))
    assert trained["eval_recon_loss"] < 0.8 * untrained["eval_recon_loss"]
    assert trained["eval_util_loss"] < untrained["eval_util_loss"] - 0.5
    assert alpha == pytest.approx([min(1.0, step / 20) for step in range(1, 81)])
    assert history(trainer, "k") == [max(4, round(12 - 8 * step / 40)) for step in range(1, 81)]
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        features = entry["recon_loss"] + entry["aux_loss"] / 32
        assert entry["loss"] == pytest.approx(3 * features + entry["util_loss"], rel=1e-4)
    assert (model.config.alpha, model.config.k) == (1.0, 4)
    for layer in model.mfn_layers.values():
        torch.testing.assert_close(layer.decoder.weight.norm(dim=-1), torch.ones(80), atol=1e-6, rtol=0)


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path):
    settings = {
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 5,
        "alpha_anneal": 1.0,
        "k_start": 9,
        "k_end": 3,
    }
    whole = train(tmp_path / "whole", make_mfn(make_base("gpt2-tied"), alpha=0.0), **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    saved = json.loads((checkpoint / "config.json").read_text())
    assert (saved["alpha"], saved["k"]) == (pytest.approx(5 / 12), round(9 - 6 * 5 / 6))
    fresh = make_mfn(make_base("gpt2-tied"), seed=99, alpha=0.0)
    for start in (fresh, MFNForCausalLM.from_pretrained(checkpoint)):
        resumed = train(tmp_path / "resumed", start, resume=str(checkpoint), **settings)
        for name in ("loss", "recon_loss", "util_loss", "alpha", "k", "grad_norm"):
            assert history(resumed, name)[-7:] == history(whole, name)[5:], name
        for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    complete = train(tmp_path / "resumed", fresh, resume=str(tmp_path / "whole" / "checkpoint-12"), **settings)
    assert complete.state.global_step == 12
    for ours, theirs in zip(complete.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lambda_util", [1.0, 0.0])
def test_accumulated_batches_give_the_gradients_of_one_large_batch(tmp_path, lambda_util):
    """Uses rows of unequal length, for which a mean of batch means would be wrong."""
    data = rows(12, padded=True)

    def gradients(batch_size, steps):
        taken = {}

        class Keep(MFNTrainer):
            def _clip_grad_norm(self, model):
                taken.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
                return super()._clip_grad_norm(model)

        model = make_mfn(make_base("llama-tied").double(), alpha=0.0)
        settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps, "max_steps": 1}
        settings |= {"alpha_start": 0.5, "lambda_util": lambda_util, "train_sampling_strategy": "sequential"}
        trainer = Keep(model, arguments(tmp_path, **settings), train_dataset=data)
        trainer.train()
        return taken, trainer.state.log_history[0]

    (large, large_log), (small, small_log) = gradients(12, 1), gradients(3, 4)
    assert large.keys() == small.keys()
    assert any(".mfn." in name for name in large)
    assert any(".mfn." not in name for name in large) == bool(lambda_util)
    for name, gradient in large.items():
        torch.testing.assert_close(small[name], gradient, atol=1e-10, rtol=0)
    for name in ("loss", "recon_loss"):
        assert small_log[name] == pytest.approx(large_log[name], rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lambda_recon": 0.0, "lambda_rate": 0.01},
        {"lambda_recon": 0.0, "trainable": "mfn"},
        {"lambda_recon": 0.0, "trainable": "mfn", "util_target": "kl"},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_every_weight_has_a_gradient_at_alpha_0(tmp_path, settings):
    """DDP waits for a gradient of every weight. A loss without any gradient cannot run backward."""
    missing = []

    class Watched(MFNTrainer):
        def _clip_grad_norm(self, model):
            missing.append({n for n, p in model.named_parameters() if p.requires_grad and p.grad is None})
            return super()._clip_grad_norm(model)

    model = make_mfn(make_base("llama-tied"), alpha=0.0)
    Watched(model, arguments(tmp_path, max_steps=2, **settings), train_dataset=rows(16)).train()
    assert missing == [set(), set()]


def test_mfn_layers_alone(tmp_path):
    model = make_mfn(make_base("gpt2-tied"), alpha=0.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(tmp_path, model, trainable="mfn", max_steps=3, alpha_start=0.5)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".mfn." in name}


def test_each_model_of_model_init_is_trained_like_one_that_is_given(tmp_path):
    """A hyperparameter search makes new models, whose k and m may differ, and changes arguments between trainings."""
    made = []

    def make(number):
        return make_mfn(make_base("llama-tied"), alpha=0.0, num_features=80 - 8 * number, k=6 + number)

    def model_init():
        made.append(make(len(made)))
        return made[-1]

    settings = {"trainable": "mfn", "lambda_rate": 0.1, "train_sampling_strategy": "sequential"}
    settings |= {"max_steps": 3, "logging_steps": 2}  # the third step is never logged
    trainer = MFNTrainer(model_init=model_init, args=arguments(tmp_path, **settings), train_dataset=rows(64))
    for number, window in ((1, 50_000), (2, 90)):
        trainer.args.rate_window = window
        trainer.train()
        given = train(tmp_path, make(number), rate_window=window, **settings)
        for ours, theirs in zip(made[number].parameters(), given.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        for name in ("rate_loss", "aux_loss", "dead_share", "firing_rate_cv"):
            assert history(trainer, name) == history(given, name), name


@pytest.mark.parametrize("kind", ["whole", "adapter", "cached"])
def test_no_checkpoint_is_best_before_alpha_and_k_have_arrived(tmp_path, kind):
    """Evaluations only get worse, so the first one that counts is the best. Early stopping counts from there."""
    trained = model = make_mfn(make_base("llama-tied"), alpha=0.0, layers=[1])
    data, end = rows(64), 1.0
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 8}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "less_trained", "greater_is_better": True}
    settings |= {"k_start": 9, "k_end": 3, "alpha_anneal": 0.25, "k_anneal": 0.5}
    if kind == "adapter":
        trained = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["mfn"]))
    elif kind == "cached":
        data, end = ActivationCache.write(model, data, tmp_path / "cache", dtype="float32"), 0.0
        trained = CachedResiduals(model)
        settings |= {"lambda_util": 0.0, "alpha_end": end}

    class FirstIsBest(MFNTrainer):
        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics["eval_less_trained"] = -self.state.global_step
            return output

    trainer = FirstIsBest(trained, arguments(tmp_path, **settings), train_dataset=data, eval_dataset=data)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert trainer.state.global_step == 6
    assert (trained.config.alpha, trained.config.k) == (end, 3)


def test_amounts_are_shares_or_steps(tmp_path):
    settings = {"alpha_anneal": 0.5, "k_anneal": 10, "k_start": 8, "k_end": 4, "mfn_warmup": 0.2}
    args = arguments(tmp_path, **settings)
    assert (args.alpha_schedule(50).begin, args.alpha_schedule(50).steps) == (10, 25)
    assert (args.k_schedule(50).begin, args.k_schedule(50).steps) == (10, 10)
    halves = arguments(tmp_path, mfn_warmup=0.5, alpha_anneal=0.5)  # 3.5 of 7 steps each
    assert [halves.alpha_schedule(7).at(step) for step in (4, 7)] == [0, 1]


def test_schedules_must_fit_into_the_training(tmp_path):
    """The length of a training given in epochs is known only when it starts: 16 steps here."""
    settings = {"max_steps": -1, "num_train_epochs": 1, "k_start": 9, "k_end": 3, "k_anneal": 10, "mfn_warmup": 7}
    with pytest.raises(ValueError, match="mfn_warmup is 7 and k_anneal is 10, 17 steps together; the training has 16,"):
        train(tmp_path, **settings)
    trainer = train(tmp_path, **(settings | {"mfn_warmup": 6}))
    assert (trainer.model.config.alpha, trainer.model.config.k) == (1.0, 3)


def test_a_part_is_averaged_over_the_steps_that_have_it(tmp_path):
    """The warm-up ends, and the utility loss starts, between two log entries."""
    settings = {"max_steps": 5, "mfn_warmup": 2, "gradient_accumulation_steps": 2}
    logged, each = (train(tmp_path, data=rows(64, padded=True), logging_steps=steps, **settings) for steps in (5, 1))
    for name, steps in (("recon_loss", 5), ("util_loss", 3)):
        assert len(history(each, name)) == steps
        assert history(logged, name) == [pytest.approx(sum(history(each, name)) / steps, rel=1e-5)]


def test_the_warm_up_trains_mfn_layers_alone_and_then_all(tmp_path):
    model = make_mfn(make_base("llama-tied"), alpha=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {"mfn_warmup": 4, "alpha_anneal": 2, "k_start": 9, "k_end": 5, "k_anneal": 2, "weight_decay": 0.1}
    train(tmp_path, model, max_steps=4, **(settings | {"alpha_end": 0.0, "k_end": 9}))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".mfn." in name}
    assert all(p.requires_grad for p in model.parameters()), "a training that ends in its warm-up leaves nothing frozen"

    model = make_mfn(make_base("llama-tied"), alpha=0.0)
    trainer = train(tmp_path, model, max_steps=7, **settings)
    assert history(trainer, "alpha") == [0, 0, 0, 0, 0.5, 1, 1]
    assert history(trainer, "k") == [9, 9, 9, 9, 7, 5, 5]
    assert len(history(trainer, "util_loss")) == 3
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(before)


def test_a_resumed_run_goes_through_its_warm_up_and_knows_its_features(tmp_path):
    """A checkpoint holds all state of the objective. This training has dead features, a rate floor and noise."""
    settings = {"max_steps": 10, "save_strategy": "steps", "save_steps": 3, "mfn_warmup": 5, "lambda_stab": 0.1}
    settings |= {"rate_floor": 1.0, "rate_window": 150, "reinit_dead_every": 4, "lambda_rate": 0.01}
    whole = train(tmp_path / "whole", make_mfn(make_base("llama-tied"), alpha=0.0, k=3), **settings)
    for step in (3, 6):
        fresh = make_mfn(make_base("llama-tied"), seed=99, alpha=0.0, k=3)
        resumed = train(tmp_path / str(step), fresh, resume=str(tmp_path / "whole" / f"checkpoint-{step}"), **settings)
        for name in ("loss", "recon_loss", "rate_loss", "stab_loss", "aux_loss", "dead_share", "alpha"):
            assert history(resumed, name) == history(whole, name), name
        for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_resuming_leaves_out_a_checkpoint_that_was_not_written_to_its_end(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path, **settings)
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    cut = (tmp_path / "checkpoint-4" / "trainer_state.json").read_text()[:-20]
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(cut)
    assert find_complete_checkpoint(tmp_path).endswith("checkpoint-2")
    resumed = train(tmp_path, resume=True, **settings)
    assert history(resumed, "loss") == history(whole, "loss")
    with pytest.raises(ValueError, match="has no complete checkpoint to resume from"):
        train(tmp_path / "nowhere", resume=True)


def test_the_record_tells_how_the_model_was_trained(tmp_path):
    data = rows(64, padded=True)
    settings = {"max_steps": 3, "alpha_anneal": 1.0, "logging_steps": 3, "lambda_rate": 0.25}
    trainer = train(tmp_path, data=data, save_strategy="steps", save_steps=2, **settings)
    trainer.save_model()
    record = json.loads((tmp_path / "training_record.json").read_text())
    saved = json.loads((tmp_path / "checkpoint-2" / "training_record.json").read_text())
    assert (saved["steps"], saved["alpha"], saved["k"]) == (2, pytest.approx(2 / 3), 6)  # before the first log
    assert record["alpha"] == 1.0
    assert not {"alpha", "k"} & record["figures"].keys()
    assert record["steps"] == 3
    assert (record["arguments"]["lambda_rate"], record["arguments"]["learning_rate"]) == (0.25, 5e-3)
    assert record["figures"]["recon_loss"] == history(trainer, "recon_loss")[-1]
    assert 12 * 6 < record["tokens"] < 12 * 12
    assert str(tmp_path) not in json.dumps(record)


def test_the_record_keeps_places_and_secrets_to_itself(tmp_path):
    (tmp_path / "secret.json").write_text(json.dumps({"split_batches": False}))
    places = {"resume_from_checkpoint": "secret/checkpoint-1", "project": "secret", "trackio_space_id": "secret/board"}
    places |= {"hub_token": "secret", "run_name": "secret", "accelerator_config": str(tmp_path / "secret.json")}
    places |= {"optim_args": "/home/secret", "hub_revision": "C:\\secret", "metric_for_best_model": "loss"}
    MFNTrainer(make_mfn(make_base("llama-tied"), k=6), arguments(tmp_path, **places)).save_model()
    text = (tmp_path / "training_record.json").read_text()
    assert "secret" not in text
    assert json.loads(text)["arguments"]["metric_for_best_model"] == "loss"


def test_distillation_trains_without_labels(tmp_path):
    data, weights = rows(64, padded=True), []
    for columns in ([], ["labels"]):
        model = make_mfn(make_base("llama-tied"), alpha=0.0, k=6)
        settings = {"util_target": "kl", "trainable": "mfn", "alpha_start": 1.0, "max_steps": 3}
        trainer = train(tmp_path, model, data.remove_columns(columns), **settings)
        weights.append(torch.cat([layer.encoder.weight for layer in trainer.model.mfn_layers.values()]))
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target", ["tokens", "kl"])
def test_a_step_without_labels_trains_features_alone(tmp_path, target):
    unlabelled = rows(8).map(lambda row: {"labels": [-100] * len(row["labels"])})
    found = []
    for settings in ({"util_target": target, "trainable": "mfn"}, {"lambda_util": 0.0, "trainable": "mfn"}):
        model = make_mfn(make_base("llama-tied"), alpha=0.0, k=6)
        trainer = train(tmp_path, model, unlabelled, alpha_start=1.0, max_steps=2, **settings)
        assert all(math.isfinite(value) for value in history(trainer, "loss"))
        found.append((trainer.model.state_dict(), history(trainer, "loss"), history(trainer, "util_loss")))
    (weights, losses, of_tokens), (others, expected, _) = found
    assert of_tokens == [0.0, 0.0]
    assert losses == pytest.approx(expected, rel=1e-6)
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("given", [False, True])
def test_distillation_takes_the_base_s_own_distribution_and_streams(tmp_path, given):
    """The losses at alpha = 1 are the KL divergence and the distances from the base. At alpha = 0 they are 0."""
    base = make_base("gpt2-tied")
    model = make_mfn(base)
    data = rows(8, padded=True)
    settings = {"util_target": "kl", "trainable": "all" if given else "mfn", "per_device_eval_batch_size": 8}
    settings["lambda_streams"] = 0.5
    trainer = MFNTrainer(model, arguments(tmp_path, **settings), base_model=base if given else None, eval_dataset=data)
    batch = {name: torch.tensor(data[name]) for name in data.column_names}
    labels = batch.pop("labels")
    ours, theirs = (each(**batch).logits[:, :-1].log_softmax(-1) for each in (model, base))
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)[labels[:, 1:] != -100].mean()
    ours, theirs = (each(**batch, output_hidden_states=True).hidden_states[1:] for each in (model, base))
    distance = sum(
        ((h - h_hat).square().sum(-1) / h.var(-1, correction=0) / h.shape[-1])[batch["attention_mask"] == 1].mean()
        for h, h_hat in zip(theirs, ours, strict=True)
    )
    found = trainer.evaluate()
    assert found["eval_util_loss"] == pytest.approx(divergence.item(), rel=1e-4)
    assert found["eval_streams_loss"] == pytest.approx(distance.item(), rel=1e-4)
    features = 3 * found["eval_recon_loss"]
    assert found["eval_loss"] == pytest.approx(divergence.item() + 0.5 * distance.item() + features, rel=1e-4)
    model.set_blend(0.0)
    found = trainer.evaluate()
    assert (found["eval_util_loss"], found["eval_streams_loss"]) == pytest.approx((0.0, 0.0), abs=1e-6)


def test_distillation_needs_a_base_where_the_backbone_moves(tmp_path):
    model = make_mfn(make_base("llama-tied"))
    with pytest.raises(ValueError, match="give the base model as base_model"):
        MFNTrainer(model, arguments(tmp_path, util_target="kl"), train_dataset=rows(4))
    with pytest.raises(ValueError, match=r"lambda_streams is 1\.0, and util_target 'tokens'"):
        arguments(tmp_path, lambda_streams=1.0)


@pytest.mark.parametrize("stop", [True, False])
def test_feature_losses_reach_the_backbone_only_where_asked(tmp_path, stop):
    model = make_mfn(make_base("gpt2-tied"), alpha=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(tmp_path, model, max_steps=1, lambda_util=0.0, alpha_end=0.0, stop_gradient=stop)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any(".mfn." not in name for name in changed) == (not stop)


def test_figures_of_each_layer_on_demand(tmp_path):
    model = make_mfn(make_base("llama-tied"), alpha=0.0, layers=[0, 2])
    trainer = train(tmp_path, model, max_steps=1, log_layers=True, lambda_comp=0.1)
    entry = trainer.state.log_history[0]
    for name in ("recon_loss", "comp_loss", "explained_variance", "dead_share"):
        assert entry[name] == pytest.approx((entry[f"layer_0/{name}"] + entry[f"layer_2/{name}"]) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lambda_recon": -1.0}, "lambda_recon is -1.0"),
        ({"lambda_util": float("nan")}, "lambda_util is nan"),
        ({"lambda_recon": 0.0, "lambda_util": 0.0}, "nothing to train on"),
        ({"alpha_start": 2.0}, "alpha_start is 2.0"),
        ({"alpha_anneal": -0.5}, "alpha_anneal is -0.5"),
        ({"k_start": 4}, "k_start is 4 and k_end is None"),
        ({"trainable": "lora"}, "trainable is 'lora'"),
        ({"lambda_recon": 0.0, "mfn_warmup": 0.1}, "lambda_recon is 0, but the warm-up"),
        ({"mfn_warmup": 0.8}, "mfn_warmup is 0.8 and alpha_anneal is 0.25, 21 steps together; the training has 20"),
        ({"rho": 1.0}, "rho is 1.0"),
        ({"stability_fraction": 1.5}, "stability_fraction is 1.5"),
        ({"stability_perturbation": "dropout", "stability_strength": 1.0}, "stability_strength is 1.0"),
        ({"k_shape": "square"}, "k_shape is 'square'; it must be one of linear, cosine"),
        ({"mfn_learning_rate": 0.0}, "mfn_learning_rate is 0.0"),
        ({"rate_window": 0}, "rate_window is 0"),
        ({"reinit_dead_every": -1}, "reinit_dead_every is -1"),
        ({"optim": "schedule_free_adamw"}, "optim is 'schedule_free_adamw'"),
        ({"optim": "adamw_bnb_8bit", "reinit_dead_every": 5}, "optim is 'adamw_bnb_8bit'.* reinit_dead_every must be"),
        ({"optim": "adamw_torch_4bit", "reinit_dead_every": 5}, "optim is 'adamw_torch_4bit'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
    ],
)
def test_bad_arguments(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


def test_arguments_of_an_earlier_version_are_read(tmp_path):
    """Reads a record of version 0.1.0 that has removed options at their defaults."""
    record = json.loads((FIXTURES / "0.1.0" / "llama" / "checkpoint" / "training_record.json").read_text())
    assert {"rate_estimator", "rate_width", "schedule_stairs"} < record["arguments"].keys()
    upstream = {field.name for field in fields(MFNTrainingArguments)}  # older transformers lack some options
    read = {name: value for name, value in without_removed(record["arguments"]).items() if name in upstream}
    args = MFNTrainingArguments(output_dir=str(tmp_path), **read)
    assert (args.lambda_rate, args.k_start, args.k_end, args.alpha_shape) == (0.1, 6, 3, "linear")
    with pytest.raises(ValueError, match=r"rate_width is 2.0; this option is gone, and training uses 0.5"):
        without_removed({"rate_width": 2.0})


def test_bad_arguments_for_this_model(tmp_path):
    from transformers import TrainingArguments

    model = make_mfn(make_base("llama-tied"))
    with pytest.raises(ValueError, match=r"k is 200; .* \(80\)"):
        MFNTrainer(model, arguments(tmp_path, k_start=200, k_end=3), train_dataset=rows(4))
    with pytest.raises(ValueError, match="TrainingArguments; MFNTrainer takes MFNTrainingArguments"):
        MFNTrainer(model, TrainingArguments(output_dir=str(tmp_path), report_to=[]), train_dataset=rows(4))


def test_a_base_model_and_no_data_are_refused(tmp_path, family_base):
    with pytest.raises(ValueError, match="has no MFN layers; convert the model first"):
        MFNTrainer(family_base, arguments(tmp_path), train_dataset=rows(4))
    with pytest.raises(ValueError, match="has no MFN layers; convert the model first"):
        ActivationCache.write(family_base, rows(4), tmp_path / "cache")
    model = make_mfn(family_base)
    for empty in ([], rows(4).select([])):
        with pytest.raises(ValueError, match="train_dataset is empty"):
            train(tmp_path, model, data=empty)
        with pytest.raises(ValueError, match="data set of the evaluation is empty"):
            MFNTrainer(model, arguments(tmp_path)).evaluate(empty)


def test_rows_of_unequal_length_without_a_padding_token_are_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    trainer = MFNTrainer(make_mfn(make_base("gpt2-tied")), arguments(tmp_path), processing_class=tokenizer)
    trainer.train_dataset = Dataset.from_dict({"input_ids": [[3, 4, 5], [3, 4], [5, 6], [7, 8, 9]]})
    with pytest.raises(ValueError, match="rows differ in length, and the tokenizer has no padding token"):
        trainer.train()

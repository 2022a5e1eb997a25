"""Evaluation by the trainer: losses, figures of the features, data without labels."""

import copy

import pytest
import torch
from conftest import make_base, make_mfn
from datasets import Dataset
from trainings import arguments, history, rows

from modeling_mfn import MFNTrainer


def test_evaluation_reports_the_parts(tmp_path):
    model = make_mfn(make_base("llama-tied"), alpha=0.0, k=6)
    data = rows(16, padded=True)
    trainer = MFNTrainer(model, arguments(tmp_path, lambda_recon=0.5, lambda_util=2.0), eval_dataset=data)
    metrics = trainer.evaluate()
    batch = {name: torch.tensor(data[name]) for name in data.column_names}
    out = model(**batch, output_reconstructions=True)
    shares = []
    for item in out.reconstructions.values():  # padding left out
        h, h_hat = (of[batch["attention_mask"].bool()].double() for of in item[:2])
        std = h.std(-1, unbiased=False, keepdim=True)
        x, error = (h - h.mean(-1, keepdim=True)) / std, (h - h_hat) / std
        shares.append(error.square().sum(-1).mean() / x.var(0).sum())
    assert metrics["eval_recon_loss"] == pytest.approx(torch.stack(shares).mean().item(), rel=1e-4)
    # the losses of 3 layers add up, and their mean is reported
    assert metrics["eval_loss"] == pytest.approx(
        0.5 * 3 * metrics["eval_recon_loss"] + 2 * metrics["eval_util_loss"], rel=1e-5
    )
    assert trainer.predict(data).predictions.shape == (16, 12, 96)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied"])
@pytest.mark.parametrize("settings", [{}, {"util_target": "kl", "trainable": "mfn", "lambda_streams": 1.0}])
def test_an_evaluation_is_the_same_in_batches_of_any_size(tmp_path, name, settings):
    """Rows differ in padding, and some have no label at all."""
    model, data = make_mfn(make_base(name), alpha=0.5, k=6), rows(16, padded=True).to_dict()
    data["labels"][3:6] = [[-100] * 12] * 3
    results = []
    for size in (1, 3, 16):
        args = arguments(tmp_path, lambda_rate=0.1, per_device_eval_batch_size=size, log_layers=True, **settings)
        metrics = MFNTrainer(model, args, eval_dataset=Dataset.from_dict(data)).evaluate()
        results.append({name: value for name, value in metrics.items() if not name.endswith(("time", "second"))})
    assert {"eval_loss", "eval_util_loss", "eval_recon_loss", "eval_rate_loss"} <= set(results[0])
    for found in results[1:]:
        assert found == pytest.approx(results[0], rel=1e-4)


def test_labels_that_do_not_count_have_no_share_in_an_evaluation(tmp_path):
    """The loss is the cross entropy per label, computed here; without any label there is none."""
    model, data = make_mfn(make_base("llama-tied"), alpha=0.0, k=6), rows(16).to_dict()
    data["labels"][4:9] = [[-100] * 12] * 5
    args = arguments(tmp_path, per_device_eval_batch_size=4)
    some = MFNTrainer(model, args, eval_dataset=Dataset.from_dict(data)).evaluate()
    labels = torch.tensor(data["labels"])[:, 1:]
    logits = model(torch.tensor(data["input_ids"])).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert some["eval_util_loss"] == pytest.approx(expected.item(), rel=1e-5)
    none = MFNTrainer(model, args, eval_dataset=Dataset.from_dict(data | {"labels": [[-100] * 12] * 16})).evaluate()
    assert none["eval_recon_loss"] == pytest.approx(some["eval_recon_loss"])
    assert none["eval_loss"] == pytest.approx(3 * some["eval_recon_loss"])
    assert "eval_util_loss" not in none


def test_evaluation_counts_what_the_features_do(tmp_path):
    """Compares figures over all batches with dense codes. Evaluation does not change the counts of training."""
    data = rows(10, padded=True)
    settings = {"max_steps": 4, "rate_window": 10**6, "log_layers": True, "per_device_eval_batch_size": 4}
    logs, model = [], make_mfn(make_base("llama-tied"), alpha=0.0, k=3, layers=[0, 2])
    model.prune_features(2, [5, 6])
    for strategy in ({"eval_strategy": "no"}, {"eval_strategy": "steps", "eval_steps": 2}):
        trained = copy.deepcopy(model)
        trainer = MFNTrainer(
            trained, arguments(tmp_path, **settings, **strategy), train_dataset=rows(64), eval_dataset=data
        )
        trainer.train()
        logs.append([history(trainer, name) for name in ("recon_loss", "explained_variance", "firing_rate_cv")])
    assert logs[0] == logs[1]
    measured = trainer.evaluate()
    real = torch.tensor(data["attention_mask"]).bool()
    batch = {name: torch.tensor(data[name]) for name in ("input_ids", "attention_mask")}
    items = trained.eval()(**batch, output_reconstructions=True).reconstructions
    layers = []
    for layer, item in items.items():
        h, h_hat = (part[real].detach().double() for part in item[:2])
        std = h.std(-1, keepdim=True)
        x, error = (h - h.mean(-1, keepdim=True)) / std, (h - h_hat) / std
        active = item.code.to_dense()[real] > 0
        kept = torch.tensor([feature not in (5, 6) or layer != 2 for feature in range(80)])
        rates = active[:, kept].double().mean(0)
        layers.append(
            {
                "explained_variance": 1 - error.square().sum() / (x - x.mean(0)).square().sum(),
                "active_features": active.double().sum(-1).mean(),
                "dead_share": (rates == 0).double().mean(),
                "firing_rate_std": rates.std(),
                "firing_rate_cv": rates.std() / rates.mean(),
            }
        )
        assert layers[-1]["dead_share"] > 0
        for name, value in layers[-1].items():
            assert measured[f"eval_layer_{layer}/{name}"] == pytest.approx(value.item(), rel=1e-3), name
    for name in layers[0]:
        mean = sum(layer[name].item() for layer in layers) / 2
        assert measured[f"eval_{name}"] == pytest.approx(mean, rel=1e-3), name


def test_evaluation_with_distillation_has_the_next_token_loss_beside(tmp_path):
    model, data = make_mfn(make_base("gpt2-tied")), rows(16, padded=True)
    kl, tokens = (
        MFNTrainer(model, arguments(tmp_path, trainable="mfn", util_target=target), eval_dataset=data).evaluate()
        for target in ("kl", "tokens")
    )
    assert kl["eval_next_token_loss"] == pytest.approx(tokens["eval_util_loss"], rel=1e-6)
    assert kl["eval_util_loss"] != pytest.approx(tokens["eval_util_loss"], rel=0.1)
    assert "eval_next_token_loss" not in tokens


@pytest.mark.parametrize("settings", [{"lambda_util": 0.0}, {"util_target": "kl", "trainable": "mfn"}, {}])
def test_evaluation_without_labels_measures_the_features(tmp_path, settings):
    model, data = make_mfn(make_base("llama-tied"), alpha=0.0, k=6), rows(16, padded=True)
    trainer = MFNTrainer(model, arguments(tmp_path, lambda_comp=0.5, **settings), eval_dataset=data)
    labelled, unlabelled = trainer.evaluate(), trainer.evaluate(data.remove_columns("labels"))
    for name in ("eval_recon_loss", "eval_comp_loss"):
        assert unlabelled[name] == pytest.approx(labelled[name])
    features = 3 * (labelled["eval_recon_loss"] + 0.5 * labelled["eval_comp_loss"])
    if "util_target" in settings:  # the KL loss needs labels only to leave out padding
        assert unlabelled["eval_util_loss"] == pytest.approx(labelled["eval_util_loss"], rel=1e-5)
        features += labelled["eval_util_loss"]
    else:
        assert "eval_util_loss" not in unlabelled
    assert unlabelled["eval_loss"] == pytest.approx(features, rel=1e-5)
    predicted = trainer.predict(data.remove_columns("labels"))
    assert predicted.predictions == pytest.approx(trainer.predict(data).predictions)
    assert predicted.predictions.shape == (16, 12, 96)
    assert predicted.label_ids is None


def test_evaluation_without_labels_where_the_utility_is_the_only_loss(tmp_path):
    args = arguments(tmp_path, lambda_recon=0.0)
    trainer = MFNTrainer(make_mfn(make_base("llama-tied")), args, eval_dataset=rows(4).remove_columns("labels"))
    assert not any(name.endswith("loss") for name in trainer.evaluate())

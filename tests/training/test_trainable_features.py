"""Training of chosen features only. All other weights stay equal bit for bit."""

import json

import pytest
import torch
from conftest import make_base, make_mfn
from trainings import arguments, history, rows, train
from transformers import HfArgumentParser, Trainer

from modeling_mfn import MFNTrainer, MFNTrainingArguments
from modeling_mfn.training.activation_cache import ActivationCache, CachedResiduals
from modeling_mfn.training.arguments import parse_trainable_features

CHOSEN = {"0": [7, 9, 60], "2": [0, 79]}
SETTINGS = {"trainable_features": CHOSEN, "alpha_start": 1.0, "weight_decay": 0.5, "rate_floor": 1.0}


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed_rows(model, before, layer):
    """Maps parameter names in the layer to the rows that differ from `before`."""
    found = {}
    for name, parameter in model.named_parameters():
        place = f".{layer}.mfn."
        if place in name:
            different = (parameter != before[name]).reshape(len(parameter), -1).any(-1)
            found[name.partition(place)[2]] = different.nonzero().flatten().tolist()
    return found


def check(model, before, chosen=CHOSEN):
    """Checks that every row of the chosen features changed, and no other weight."""
    for name, parameter in model.named_parameters():
        if ".mfn." not in name:
            assert torch.equal(parameter, before[name]), name
    for layer in model.mfn_layers:
        features = chosen.get(str(layer), [])
        parts = ("encoder.weight", "encoder.bias", "decoder.weight")
        assert changed_rows(model, before, layer) == dict.fromkeys(parts, features) | {"decoder.bias": []}


@pytest.mark.halved
@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "adamw_torch", "gradient_accumulation_steps": 2, "lambda_rate": 0.01, "lambda_stab": 0.1},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "adafactor", "max_grad_norm": 0.0},
        {"bf16": True, "mfn_learning_rate": 0.02, "trainable": "mfn"},
    ],
    ids=lambda settings: next(iter(settings.values())),
)
def test_only_chosen_features_change(family_base, tmp_path, settings):
    model = make_mfn(family_base, k=12)
    with torch.no_grad():  # norms that are not 1, so that normalising a frozen direction would show
        for layer in model.mfn_layers.values():
            layer.decoder.weight *= 1.001
            layer.encoder.bias[torch.arange(80)] += 0.3
    before = weights(model)
    train(tmp_path, model, max_steps=4, **(SETTINGS | settings))
    check(model, before)
    for layer, features in CHOSEN.items():
        norms = model.mfn_layers[int(layer)].decoder.weight[features].norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones(len(features)), atol=1e-6, rtol=0)


def test_gradients_of_other_features_do_not_count_when_gradients_are_clipped(tmp_path):
    taken = {}

    class Keep(MFNTrainer):
        def _clip_grad_norm(self, model):
            taken.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            return super()._clip_grad_norm(model)

    norms = []
    for chosen in (None, CHOSEN):
        model = make_mfn(make_base("llama-tied"), k=12)
        args = arguments(tmp_path, **(SETTINGS | {"trainable_features": chosen, "lambda_aux": 0.0, "max_steps": 1}))
        trainer = Keep(model, args, train_dataset=rows(8))
        trainer.train()
        norms.append(history(trainer, "grad_norm")[0])
        if chosen is None:
            mine = [
                gradient[features].square().sum()
                for layer, features in CHOSEN.items()
                for name, gradient in taken.items()
                if f".{layer}.mfn." in name and not name.endswith("decoder.bias")
            ]
    assert norms[1] == pytest.approx(torch.stack(mine).sum().sqrt().item(), rel=1e-4)
    assert norms[1] < 0.9 * norms[0]


def test_reset_features_learn_again_while_the_rest_is_frozen(tmp_path):
    data = rows(64)
    model = make_mfn(make_base("llama-tied"), alpha=0.0, layers=[1])
    code = model(torch.tensor(data["input_ids"]), output_codes=True).codes[1]
    used = torch.bincount(code.indices[code.values > 0], minlength=80).topk(12).indices

    def measure():
        return MFNTrainer(model, arguments(tmp_path), eval_dataset=data).evaluate()["eval_recon_loss"]

    model.reset_features(1, used, generator=torch.Generator().manual_seed(0))
    reset, before = measure(), weights(model)
    settings = {"trainable_features": {1: used.tolist()}, "alpha_end": 0.0, "lambda_util": 0.0, "learning_rate": 0.02}
    train(tmp_path, model, data, max_steps=40, lambda_aux=1.0, rate_window=500, **settings)
    assert measure() < 0.8 * reset
    check(model, before, {"1": sorted(used.tolist())})


def test_from_cached_residuals_and_in_a_compacted_model(tmp_path):
    """Features keep their names in a compacted model, in which their rows have moved."""
    data = rows(20)
    model = make_mfn(make_base("llama-tied"), alpha=0.0, k=12)
    model.prune_features(0, [1, 8, 50])
    model.compact(keep_competition=False)
    model.prune_features(0, [70])
    model.compact()
    cache = ActivationCache.write(model, data, tmp_path / "cache", dtype="float32")
    before = weights(model)
    settings = SETTINGS | {"alpha_start": 0.0, "alpha_end": 0.0, "lambda_util": 0.0, "max_steps": 4}
    MFNTrainer(CachedResiduals(model), arguments(tmp_path, **settings), train_dataset=cache).train()
    encoder = decoder = [6, 7, 57]  # rows of 7, 9 and 60 after removal of 1, 8 and 50
    found = changed_rows(model, before, 0)
    assert found == {"encoder.weight": encoder, "encoder.bias": encoder, "decoder.weight": decoder, "decoder.bias": []}
    assert changed_rows(model, before, 2)["decoder.weight"] == CHOSEN["2"]


def test_a_resumed_training_of_chosen_features(tmp_path):
    settings = SETTINGS | {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    model = make_mfn(make_base("llama-tied"), k=12)
    before = weights(model)
    whole = train(tmp_path / "whole", model, **settings)
    record = json.loads((tmp_path / "whole" / "checkpoint-3" / "training_record.json").read_text())
    assert record["arguments"]["trainable_features"] == CHOSEN
    again = make_mfn(make_base("llama-tied"), seed=5, k=12)
    train(tmp_path / "again", again, resume=str(tmp_path / "whole" / "checkpoint-3"), **settings)
    check(again, before)
    for ours, theirs in zip(again.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "given",
    [
        {"6": [9, 7], "10": [0]},
        {6: (7, 9), 10: [0, 0]},
        ["L6/7", "L6/9", "L10/0"],
        [(6, 7), (6, 9), (10, 0)],
        "L6/7, L6/9,L10/0",
        '{"6": [7, 9], "10": [0]}',
        '["L6/7", "L6/9", "L10/0"]',
    ],
)
def test_ways_to_name_features(given, tmp_path):
    expected = {"6": [7, 9], "10": [0]}
    assert parse_trainable_features(given) == expected
    parser = HfArgumentParser(MFNTrainingArguments)
    if isinstance(given, str):
        command = ["--output_dir", str(tmp_path), "--trainable_features", given]
        assert parser.parse_args_into_dataclasses(command)[0].trainable_features == expected
    else:
        file = tmp_path / "arguments.json"
        file.write_text(json.dumps({"output_dir": str(tmp_path), "trainable_features": given}))
        assert parser.parse_json_file(str(file))[0].trainable_features == expected


@pytest.mark.parametrize("given", ["", "6/7", "{}", "{6: [7]}", [], {"6": []}, {"six": [7]}, {"6": 7}, {"6": [7.5]}, 7])
def test_what_names_no_features(given):
    with pytest.raises(ValueError, match=r"trainable_features is .*; it must name features"):
        parse_trainable_features(given)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"1": [3]}, "block 1 has no MFN layer"),
        ({"0": [80]}, "L0/80 does not exist"),
        ({"0": [5]}, "L0/5 is pruned"),
    ],
)
def test_features_that_cannot_be_trained(tmp_path, chosen, message):
    model = make_mfn(make_base("llama-tied"), layers=[0, 2])
    model.prune_features(0, [5])
    with pytest.raises(ValueError, match=message):
        MFNTrainer(model, arguments(tmp_path, trainable_features=chosen), train_dataset=rows(4))


def test_what_does_not_go_with_chosen_features(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="reinit_dead_every is 5; with trainable_features it must be 0"):
        arguments(tmp_path, trainable_features=CHOSEN, reinit_dead_every=5)
    args = arguments(tmp_path, trainable_features=CHOSEN)
    with pytest.raises(ValueError, match="trainable_features is set; it must not be with shared_decoder=True"):
        MFNTrainer(make_mfn(make_base("llama-tied"), shared_decoder=True), args, train_dataset=rows(4))
    set_up = Trainer.create_accelerator_and_postprocess

    def as_with_fsdp(self):
        set_up(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", as_with_fsdp)
    with pytest.raises(ValueError, match="trainable_features is not available under FSDP"):
        MFNTrainer(make_mfn(make_base("llama-tied")), args, train_dataset=rows(4))

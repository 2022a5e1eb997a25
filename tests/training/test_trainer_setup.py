"""Arguments of the trainer, and its errors and warnings before the first step."""

import pytest
import torch
from conftest import make_base, make_mfn
from trainings import arguments, rows
from transformers import default_data_collator
from transformers.utils import logging

from modeling_mfn import MFNTrainer


def test_positional_arguments_are_those_of_trainer(tmp_path):
    data = rows(4)
    trainer = MFNTrainer(make_mfn(make_base("llama-tied")), arguments(tmp_path), default_data_collator, data)
    assert trainer.data_collator is default_data_collator
    assert (trainer.train_dataset, trainer.base_model) == (data, None)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"k_start": 80, "k_end": 8}, "k_start is 80"), ({"k_start": 8, "k_end": 80}, "k_end is 80"), ({}, "k is 80")],
)
def test_all_features_active_leave_the_rate_loss_no_target(tmp_path, settings, named):
    """The error names k, because rho follows from k if the user sets no rho."""

    def trainer(**more):
        model = make_mfn(make_base("llama-tied"), alpha=0.0, k=8 if settings else 80)
        return MFNTrainer(model, arguments(tmp_path, max_steps=2, **settings, **more), train_dataset=rows(8))

    with pytest.raises(ValueError, match=named):
        trainer(lambda_rate=0.01)
    trainer(lambda_rate=0.01, rho=0.1).train()
    trainer().train()


@pytest.mark.parametrize(
    ("dtype", "settings", "warned"),
    [
        (torch.bfloat16, {}, 1),
        (torch.bfloat16, {"bf16": True}, 1),  # autocast does not change the weights' precision
        (torch.float32, {"bf16": True}, 0),
        (torch.float64, {}, 0),
    ],
)
def test_mfn_layers_that_are_trained_below_float32_are_warned_of_once(tmp_path, caplog, dtype, settings, warned):
    model = make_mfn(make_base("llama-tied").to(dtype), alpha=0.0)
    logging.enable_propagation()
    MFNTrainer(model, arguments(tmp_path, **settings), train_dataset=rows(4))
    logging.disable_propagation()
    assert sum("below float32" in record.message for record in caplog.records) == warned


def test_frozen_mfn_layers_may_have_any_precision(tmp_path, caplog):
    model = make_mfn(make_base("llama-tied").to(torch.bfloat16), alpha=0.0)
    for layer in model.mfn_layers.values():
        layer.requires_grad_(False)
    logging.enable_propagation()
    MFNTrainer(model, arguments(tmp_path), train_dataset=rows(4))
    logging.disable_propagation()
    assert "below float32" not in caplog.text

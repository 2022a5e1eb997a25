"""Several texts in one row train and calibrate like the same texts in padded rows."""

import pytest
import torch
from conftest import make_base, make_mfn
from datasets import Dataset
from trainings import arguments, history, rows
from transformers import DataCollatorWithFlattening

from modeling_mfn import MFNForCausalLM, MFNTrainer

LENGTHS = [12, 7, 5, 9]
NO_DROPOUT = {"gpt2-tied": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
PADDING = 3


def texts():
    data = rows(16).to_dict()
    return Dataset.from_dict({name: [row[: LENGTHS[at % 4]] for at, row in enumerate(data[name])] for name in data})


def padded(features):
    longest = max(len(each["input_ids"]) for each in features)

    def column(name, fill):
        return torch.tensor([each[name] + [fill] * (longest - len(each[name])) for each in features])

    counted = torch.tensor(
        [[1] * len(each["input_ids"]) + [0] * (longest - len(each["input_ids"])) for each in features]
    )
    return {"input_ids": column("input_ids", 0), "labels": column("labels", -100), "attention_mask": counted}


def block_diagonal(features):
    """Joins texts to one row with padding at its end, under a mask (1, 1, T, T) that keeps them apart."""
    row = DataCollatorWithFlattening()(features)
    row = {name: torch.nn.functional.pad(row[name], (0, PADDING)) for name in ("input_ids", "position_ids", "labels")}
    row["labels"][:, -PADDING:] = -100
    blocks = [torch.ones(len(each["input_ids"]), len(each["input_ids"])).tril() for each in features]
    mask = torch.block_diag(*blocks, torch.zeros(PADDING, PADDING)).bool()
    return row | {"attention_mask": mask[None, None]}


def added_to_scores(features):
    row = block_diagonal(features)
    mask = torch.zeros(row["attention_mask"].shape).masked_fill(~row["attention_mask"], torch.finfo(torch.float32).min)
    return row | {"attention_mask": mask}


PACKED = {"flattened": DataCollatorWithFlattening(), "mask": block_diagonal, "added mask": added_to_scores}


def trained(folder, base, collator, **settings):
    settings = {"max_steps": 3, "alpha_start": 0.5, "optim": "sgd", "train_sampling_strategy": "sequential"} | settings
    settings |= {"lambda_rate": 0.1, "lambda_comp": 0.1, "lambda_stab": 0.1, "stability_strength": 0.0}
    trainer = MFNTrainer(
        make_mfn(base, alpha=0.5, codes="update"),
        arguments(folder, stability_fraction=1.0, **settings),
        data_collator=collator,
        train_dataset=texts(),
        eval_dataset=texts(),
    )
    trainer.train()
    return trainer


@pytest.mark.halved
@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied"])
@pytest.mark.parametrize("packed", PACKED)
def test_packed_rows_train_like_padded_ones(tmp_path, name, packed):
    base = make_base(name, **NO_DROPOUT.get(name, {}))
    expected, ours = trained(tmp_path, base, padded), trained(tmp_path, base, PACKED[packed])
    for part in ("loss", "util_loss", "recon_loss", "rate_loss", "comp_loss", "explained_variance"):
        assert history(ours, part) == pytest.approx(history(expected, part), rel=1e-4), part
    for weight, theirs in zip(ours.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(weight, theirs, atol=1e-5, rtol=1e-4)
    assert ours.state.num_input_tokens_seen == expected.state.num_input_tokens_seen == 3 * sum(LENGTHS)
    measured = ours.evaluate()
    for part, value in expected.evaluate().items():
        if part in ("eval_loss", "eval_util_loss", "eval_recon_loss", "eval_rate_loss"):
            assert measured[part] == pytest.approx(value, rel=1e-4), part
    trained(tmp_path, base, PACKED[packed], stability_pass="model")


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied"])
@pytest.mark.parametrize("packed", PACKED)
def test_packed_rows_calibrate_like_padded_ones(name, packed):
    models = []
    for collator in (padded, PACKED[packed]):
        batch = collator([dict(row) for row in texts()])
        batch.pop("labels")
        torch.manual_seed(5)
        models.append(MFNForCausalLM.from_base(make_base(name), num_features=80, k=8, calibration=batch))
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mask", [torch.zeros(2, 8), torch.zeros(2, 1, 8, 8, dtype=torch.bool)])
def test_a_calibration_without_tokens_is_refused(mask):
    batch = {"input_ids": torch.arange(16).view(2, 8), "attention_mask": mask}
    with pytest.raises(ValueError, match="calibration has no token that counts"):
        MFNForCausalLM.from_base(make_base("llama-tied"), num_features=80, k=8, calibration=batch)

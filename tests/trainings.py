"""Short trainings of tiny models for the tests of the Trainer."""

import torch
from conftest import make_base, make_mfn
from datasets import Dataset

from modeling_mfn import MFNTrainer, MFNTrainingArguments


def rows(count, length=12, seed=0, padded=False):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (count, 1), generator=generator) + torch.arange(length) * 5
    data = {"input_ids": (ids % 93 + 3).tolist()}
    data["labels"] = [list(row) for row in data["input_ids"]]
    if padded:
        data["attention_mask"] = []
        for row, labels in enumerate(data["labels"]):
            short = row % 3 * 3
            data["attention_mask"].append([1] * (length - short) + [0] * short)
            labels[length - short :] = [-100] * short
    return Dataset.from_dict(data)


def arguments(folder, **settings):
    defaults = {
        "lambda_recon": 1.0,
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return MFNTrainingArguments(output_dir=str(folder), **(defaults | settings))


def train(folder, model=None, data=None, resume=None, **settings):
    model = model or make_mfn(make_base("llama-tied"), alpha=0.0, k=6)
    trainer = MFNTrainer(model, arguments(folder, **settings), train_dataset=rows(64) if data is None else data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]

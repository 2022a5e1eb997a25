"""Trainings of `test_distributed.py`, one after the other: python distributed_worker.py SETTINGS.json"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import make_base, make_mfn
from datasets import Dataset
from safetensors.torch import save_file
from trainings import rows

from modeling_mfn import MFNTrainer, MFNTrainingArguments


def allow_fsdp_on_cpu():
    """Makes accelerate use the FSDP plugin on the CPU, where torch's own fully_shard runs, too.

    accelerate uses the plugin only if it sees an accelerator.
    """
    initialise = PartialState.__init__

    def as_if_on_gpus(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_if_on_gpus


def poisoned(model, data):
    """Makes the embedding of one token nan, and puts this token into a row of the second step and second process."""

    def poison(module, arguments, embeddings):
        return embeddings.masked_fill((arguments[0] == 1).unsqueeze(-1), torch.nan)

    model.get_input_embeddings().register_forward_hook(poison)
    columns = data.to_dict()
    columns["input_ids"][16 + 12][3] = 1
    return Dataset.from_dict(columns)


def run_training(settings):
    """Trains a model and writes logs and weights into the output folder."""
    output = Path(settings["arguments"]["output_dir"])
    pursuit = {"coding_rounds": 2, "refine_steps": 1} if settings["codes"] == "update" else {}
    model = make_mfn(make_base(settings["base"]), alpha=0.0, codes=settings["codes"], **pursuit)
    arguments = MFNTrainingArguments(**settings["arguments"])
    data = rows(64, padded=settings["padded"])
    if settings["unequal"]:  # of each 16 rows the second process has the last 8
        short = [1] * 2 + [0] * 10
        masks = [short if place % 16 >= 8 else mask for place, mask in enumerate(data["attention_mask"])]
        data = data.remove_columns("attention_mask").add_column("attention_mask", masks)
    if settings["poisoned"]:
        data = poisoned(model, data)
    trainer = MFNTrainer(model, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=settings["resume"])
    trainer.save_model()
    if arguments.process_index == 0:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        (output / "logs.json").write_text(json.dumps(logs))
        if "fsdp_config" not in settings["arguments"]:
            weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            save_file(weights, output / "weights.safetensors")
    return trainer


def main(trainings):
    torch.set_num_threads(1)
    if "fsdp_config" in trainings[0]["arguments"]:
        allow_fsdp_on_cpu()
    for settings in trainings:
        AcceleratorState._reset_state()
        trainer = run_training(settings)
    trainer.end_training()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

"""Worker of `training_step.py`: trains with the modeling_mfn on its path, one step per line of standard input.

The worker imports only public names of `modeling_mfn` from this repository, so that it also runs with older versions.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from datasets import Dataset

from modeling_mfn import MFNForCausalLM, MFNTrainer, MFNTrainingArguments


class TimedTrainer(MFNTrainer):
    """Trainer that waits for a line before each step and answers with the time and the loss of the last step."""

    answers = sys.stdout
    measured: dict[str, float] = {}

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs the forward pass, the losses and the backward pass."""
        print(json.dumps(self.measured), file=self.answers, flush=True)
        if not sys.stdin.readline():
            sys.exit()
        begun = time.perf_counter(), time.process_time()
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        clock, processor = time.perf_counter() - begun[0], time.process_time() - begun[1]
        self.measured = {"clock": clock, "processor": processor, "loss": float(loss)}
        return loss


def main(settings: dict[str, Any]) -> None:
    """Trains the small model until standard input ends."""
    sys.stdout = sys.stderr  # other output must not come between the answers
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    tokens = torch.randint(4096, (settings["rows"] * settings["steps"], settings["window"]))
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})
    model = MFNForCausalLM.from_base(
        settings["base"],
        num_features=settings["num_features"],
        k=settings["k"],
        calibration={"input_ids": tokens[: settings["rows"]]},
    )
    arguments = MFNTrainingArguments(
        settings["output"],
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["rows"],
        alpha_start=1.0,
        logging_steps=settings["steps"],
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings["arguments"],
    )
    TimedTrainer(model, arguments, train_dataset=rows).train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

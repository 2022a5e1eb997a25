"""Convert a causal LM and train it as an MFN model, or continue an MFN model, with every option of Trainer and MFN.

Offline, on the demo's checkpoint and text:

    python examples/train_mfn.py --output_dir runs/train --max_steps 20

With your own, in two processes, from a file of arguments or from the command line:

    accelerate launch --num_processes 2 examples/train_mfn.py arguments.json
    accelerate launch --num_processes 2 examples/train_mfn.py --model gpt2 --text corpus/ --layers all \\
        --expansion_factor 8 --window 512 --output_dir out --mfn_warmup 0.2 --lambda_rate 1e-3 --log_layers

Training resumes from `--resume_from_checkpoint`, or else from the last complete checkpoint in the output folder.
Weights are float32 whatever the checkpoint has. `--bf16` computes faster. `--do_train False` only measures,
`--do_eval False` only trains.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from datasets import IterableDataset
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, set_seed

from modeling_mfn import MFNForCausalLM, MFNTrainer, MFNTrainingArguments
from modeling_mfn.data.text import check_window, load_text, pack
from modeling_mfn.demo.assets import shakespeare, smollm2
from modeling_mfn.training.arguments import without_removed
from modeling_mfn.training.record import find_complete_checkpoint

DEFAULTS = {"learning_rate": 1e-3, "per_device_train_batch_size": 2, "logging_steps": 5, "report_to": "none"}
DEFAULTS |= {"do_train": True, "do_eval": True}
"""Defaults that differ from those of `MFNTrainingArguments`."""


@dataclass
class ModelArguments:
    """Arguments of the conversion. An MFN model is not converted again."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id; SmolLM2-135M by default."})
    layers: str = field(default="10", metadata={"help": 'Blocks that get an MFN layer: "all", or such as "6,7".'})
    expansion_factor: int = field(
        default=4, metadata={"help": "Features per MFN layer, as a multiple of the hidden size."}
    )
    k: int = field(default=32, metadata={"help": "Largest number of active features per token."})


@dataclass
class DataArguments:
    """Arguments of the text."""

    text: list[str] | None = field(
        default=None, metadata={"help": "Files, folders or names of data sets; four plays by default."}
    )
    text_column: str = field(default="text", metadata={"help": "The column with the text, in tables."})
    window: int = field(default=128, metadata={"help": "Tokens per row."})
    held_out_rows: int = field(default=16, metadata={"help": "Rows kept back for evaluation."})


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, MFNTrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        arguments = DEFAULTS | without_removed(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
        model_args, data_args, training_args = parser.parse_dict(arguments)
    else:
        parser.set_defaults(**DEFAULTS)
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    source = model_args.model or smollm2()
    config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    check_window(data_args.window, config)
    with training_args.main_process_first(desc="packing text"):
        texts = load_text(data_args.text or shakespeare()[0][:4], data_args.text_column)
        windows = pack(texts, tokenizer, data_args.window)
    count = data_args.held_out_rows
    enough = isinstance(windows, IterableDataset) or count < len(windows)
    held_out, rows = (windows.take(count), windows.skip(count)) if enough else (windows, [])
    first = [row["input_ids"] for row in islice(rows, 16)]
    if not first and (training_args.do_train or config.model_type != "mfn"):
        raise ValueError(
            f"held_out_rows is {data_args.held_out_rows}, and the text has no more rows of {data_args.window} tokens; "
            "give more text, or hold back fewer"
        )
    if isinstance(rows, IterableDataset):  # text too large for memory: rows repeat until max_steps
        rows = rows.repeat(None).shuffle(seed=training_args.seed, buffer_size=1024)

    # float32, because lower precision loses small steps of the weights
    if config.model_type == "mfn":
        model = MFNForCausalLM.from_pretrained(source, dtype=torch.float32)
    else:
        model = MFNForCausalLM.from_base(
            source,
            layers=model_args.layers if model_args.layers == "all" else [int(n) for n in model_args.layers.split(",")],
            expansion_factor=model_args.expansion_factor,
            k=model_args.k,
            calibration={"input_ids": torch.tensor(first)},
            base_kwargs={"dtype": torch.float32},
        )

    trainer = MFNTrainer(model, training_args, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer)
    if training_args.do_train:
        last = find_complete_checkpoint(training_args.output_dir)
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint or last)
        trainer.save_model()  # also writes training_record.json
    if training_args.do_eval:
        metrics = trainer.evaluate()
        if "eval_util_loss" in metrics and training_args.util_target == "tokens":
            metrics["perplexity"] = math.exp(metrics["eval_util_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.end_training()  # otherwise one of several processes may abort or hang at exit


if __name__ == "__main__":
    main()

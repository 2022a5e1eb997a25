"""The verb `mfn train`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from ..utils.files import check_output


def train(
    model: Annotated[str, typer.Argument(help="MFN model: a folder, or an id on the Hub.")],
    output: Annotated[Path, typer.Argument(help="Folder for checkpoints and the trained model.")],
    text: Annotated[
        list[str],
        typer.Option(
            "--text",
            help="Text file, table (.jsonl, .json, .parquet, .csv), folder of them, or data set on the Hub as NAME or "
            "NAME:CONFIG; may be given several times. Long text is streamed.",
        ),
    ],
    text_column: Annotated[str, typer.Option(help="Column of tables and data sets that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of data sets on the Hub.")] = "train",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    window: Annotated[int, typer.Option(help="Tokens a row, at most the model's positions.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    lambda_recon: Annotated[float, typer.Option(help="Weight of the reconstruction loss.")] = 10.0,
    lambda_rate: Annotated[float, typer.Option(help="Weight of the rate loss.")] = 0.0,
    lambda_comp: Annotated[float, typer.Option(help="Weight of the competition loss.")] = 0.0,
    lambda_stab: Annotated[float, typer.Option(help="Weight of the stability loss.")] = 0.0,
    stability_pass: Annotated[
        Literal["layer", "model"],
        typer.Option(help="What the stability loss perturbs: inputs of MFN layers, or the embeddings."),
    ] = "layer",
    lambda_util: Annotated[float, typer.Option(help="Weight of the next-token loss.")] = 1.0,
    mfn_learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate of the MFN layers.")] = None,
    mfn_warmup: Annotated[float, typer.Option(help="Share of the training that is for MFN layers alone.")] = 0.0,
    trainable: Annotated[Literal["all", "mfn"], typer.Option(help="The whole model, or MFN layers alone.")] = "all",
    alpha_start: Annotated[float, typer.Option(help="Blend at the first step.")] = 0.0,
    alpha_end: Annotated[float, typer.Option(help="Blend after annealing.")] = 1.0,
    alpha_anneal: Annotated[float, typer.Option(help="Share of the training over which alpha moves.")] = 0.5,
    k_start: Annotated[int | None, typer.Option(help="Active features at the first step.")] = None,
    k_end: Annotated[int | None, typer.Option(help="Active features after annealing.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16; weights stay float32 meanwhile.")] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision of the trained model when it is saved.")
    ] = "float32",
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    seed: Annotated[int, typer.Option(help="Of data order and dropout.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an output folder that is not empty.")] = False,
) -> None:
    """Train an MFN model on text. examples/train_mfn.py takes every other option, too, and several processes.

    Example: mfn train gpt2-mfn gpt2-mfn-trained --text corpus.txt --steps 2000
    """
    import torch
    from datasets import IterableDataset
    from transformers import AutoConfig, AutoTokenizer

    from ..data.text import check_window, load_text, pack
    from ..model.modeling_mfn import MFNForCausalLM
    from ..training.progress import show_progress
    from ..training.trainer import MFNTrainer, MFNTrainingArguments

    if not resume:
        check_output(output, overwrite, source=model)
    arguments = MFNTrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, steps // 10),
        lambda_recon=lambda_recon,
        lambda_rate=lambda_rate,
        lambda_comp=lambda_comp,
        lambda_stab=lambda_stab,
        stability_pass=stability_pass,
        lambda_util=lambda_util,
        mfn_learning_rate=mfn_learning_rate,
        mfn_warmup=mfn_warmup,
        trainable=trainable,
        alpha_start=alpha_start,
        alpha_end=alpha_end,
        alpha_anneal=alpha_anneal,
        k_start=k_start,
        k_end=k_end,
        logging_steps=max(1, min(50, steps // 10)),
        bf16=bf16,
        use_cpu=not torch.accelerator.is_available(),  # else the Trainer refuses bf16 there
        save_steps=save_steps,
        save_total_limit=2,
        seed=seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
    )
    check_window(window, AutoConfig.from_pretrained(model))
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = pack(load_text(text, text_column, split), tokenizer, window)
    if isinstance(windows, IterableDataset):
        # endless, since the Trainer resumes in the right place of a stream only in its first epoch
        windows = windows.repeat(None).shuffle(seed=seed, buffer_size=1024)
    mfn = MFNForCausalLM.from_pretrained(model, dtype=torch.float32)  # whose last digits small steps move
    trainer = MFNTrainer(mfn, arguments, train_dataset=windows, processing_class=tokenizer)
    show_progress(trainer)
    if overwrite and not resume:
        shutil.rmtree(output, ignore_errors=True)
    trainer.train(resume_from_checkpoint=resume)
    mfn.to(getattr(torch, dtype))
    trainer.save_model()
    trainer.end()
    Console().print(f"{output}: trained for {steps} steps of {batch_size * window} tokens, alpha {mfn.config.alpha:g}")


__all__ = ["train"]

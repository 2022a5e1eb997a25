"""The verb `mfn train`."""

from __future__ import annotations

import inspect
from dataclasses import fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer
from typer.core import TyperCommand

from ..utils.files import begin_unfinished, check_output, check_space, is_filled, replace_folder, unfinished
from .inputs import load_mfn, read_config, read_tokenizer
from .options import Overwrite, console

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from ..training.arguments import MFNTrainingArguments

TRAINER_OPTIONS = ("learning_rate", "bf16", "save_steps", "seed")
"""Options that the command takes from transformers' TrainingArguments, next to all of MFN's own."""
DEFAULTS = {"learning_rate": 1e-3, "seed": 0}
"""Defaults of the command where they differ from the dataclass."""
SHUFFLED_ROWS = 1024
"""Rows of a stream that are in memory to be shuffled."""


def train(
    model: Annotated[str, typer.Argument(help="MFN model: a folder, or an id on the Hub.")],
    output: Annotated[Path, typer.Argument(help="Folder for checkpoints and the trained model.")],
    text: Annotated[
        list[str],
        typer.Option(
            "--text",
            help="Text file, table (.jsonl, .json, .parquet, .csv), folder of them, or data set on the Hub as NAME or "
            "NAME:CONFIG. May be given several times. Long text is streamed.",
        ),
    ],
    text_column: Annotated[str, typer.Option(help="Column of tables and data sets that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of data sets on the Hub.")] = "train",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    window: Annotated[int, typer.Option(min=2, help="Tokens per row, at most the model's positions.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 8,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision of the saved model.")
    ] = "float32",
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint in the output folder.")] = False,
    overwrite: Overwrite = False,
    **training: Any,
) -> None:
    """Train an MFN model on text. examples/train_mfn.py has the other options of transformers' Trainer, too, and runs
    on several processes.

    Example: mfn train gpt2-mfn gpt2-mfn-trained --text corpus.txt --steps 2000
    """
    from ..training.progress import showing_progress

    folder = _training_folder(output, resume)
    if not resume or folder != output:
        check_output(output, overwrite or resume, inputs=[model, *text])
    arguments = _arguments(folder, steps, batch_size, training)
    tokenizer, windows = _windows(model, text, text_column, split, window, arguments.seed)
    trainer = _trainer(model, arguments, windows, tokenizer)
    check_space(folder, _bytes_of_a_checkpoint(trainer.model))
    if folder != output and not resume:
        begin_unfinished(output)
    with showing_progress(trainer):
        trainer.train(resume_from_checkpoint=resume)
    _save(trainer, dtype)
    if folder != output:
        check_output(output, overwrite=True, inputs=[model, *text])  # files may have come in the meantime
        replace_folder(folder, output)
    alpha = trainer.model.config.alpha
    console.print(f"{output}: trained for {steps} steps of {batch_size * window} tokens, alpha {alpha:g}")


def _training_folder(output: Path, resume: bool) -> Path:
    """Folder in which the training writes: next to an older model, which is replaced when the new one is complete.

    Raises:
        ValueError: If an interrupted training that was to replace an older model is in the way of a new one.
    """
    from ..training.record import find_complete_checkpoint

    new = unfinished(output)
    if resume:
        return new if find_complete_checkpoint(new) else output
    if is_filled(output):
        return new
    if is_filled(new):
        raise ValueError(f"{new} holds an interrupted training of {output}; go on with it (--resume), or delete it")
    return output


def _bytes_of_a_checkpoint(model: Any) -> int:
    """Bytes of all weights and of the optimizer's two moments of those that are trained."""
    return sum(each.nbytes * (3 if each.requires_grad else 1) for each in model.parameters())


def _arguments(output: Path, steps: int, batch_size: int, training: dict[str, Any]) -> MFNTrainingArguments:
    import torch

    from ..training.arguments import MFNTrainingArguments

    return MFNTrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, steps // 10),
        logging_steps=max(1, min(50, steps // 10)),
        save_total_limit=2,
        use_cpu=not torch.accelerator.is_available(),  # otherwise the Trainer refuses bf16 on a CPU
        report_to=[],
        **training,
    )


def _windows(
    model: str, text: list[str], text_column: str, split: str, window: int, seed: int
) -> tuple[Any, Dataset | IterableDataset]:
    """The model's tokenizer, and rows of `window` tokens of the text."""
    from datasets import IterableDataset

    from ..data.text import check_window, load_text, pack

    check_window(window, read_config(model))
    tokenizer = read_tokenizer(model)
    windows = pack(load_text(text, text_column, split), tokenizer, window)
    if isinstance(windows, IterableDataset):
        # endless, since the Trainer resumes in the right place of a stream only in its first epoch
        windows = windows.repeat(None).shuffle(seed=seed, buffer_size=SHUFFLED_ROWS)
    return tokenizer, windows


def _trainer(model: str, arguments: MFNTrainingArguments, windows: Any, tokenizer: Any) -> Any:
    import torch

    from ..training.trainer import MFNTrainer

    mfn = load_mfn(model, dtype=torch.float32)  # small steps are lost in lower precision
    return MFNTrainer(mfn, arguments, train_dataset=windows, processing_class=tokenizer)


def _save(trainer: Any, dtype: str) -> None:
    import torch

    trainer.model.to(getattr(torch, dtype))
    trainer.save_model()
    trainer.end_training()


class TrainCommand(TyperCommand):
    """`mfn train` with the options of `train` and of [`MFNTrainingArguments`].

    The dataclass imports torch. Its options are therefore read when the verb is used, not when `mfn --help` lists it.
    """

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parses the command line with all options."""

        def whole(**given: Any) -> None:
            train(**given)

        _set_options(whole, _training_options())
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(help=inspect.getdoc(train))(whole)
        return typer.main.get_command(app).make_context(*args, **kwargs)


def _training_options() -> list[Parameter]:
    """One option per field of the dataclass, with the field's type, default and help."""
    from ..training.arguments import MFNTrainingArguments

    hints: dict[str, Any] = get_type_hints(MFNTrainingArguments)
    hints["trainable_features"] = str | None  # of its ways to name features, those that fit on a command line
    options = []
    for field in fields(MFNTrainingArguments):
        own = field.name in MFNTrainingArguments.__annotations__
        if own or field.name in TRAINER_OPTIONS:
            default, panel = DEFAULTS.get(field.name, field.default), "MFN training" if own else "Trainer"
            option = typer.Option(default, help=field.metadata["help"], rich_help_panel=panel)
            options.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=option, annotation=hints[field.name]))
    return options


def _set_options(verb: Any, training: list[Parameter]) -> None:
    """Gives a function the options of `train`, and more, in place of `**training`, which Typer does not know."""
    parameters = inspect.signature(train, eval_str=True).parameters.values()
    own = [parameter for parameter in parameters if parameter.kind is not Parameter.VAR_KEYWORD]
    verb.__signature__ = Signature([*own, *training])


_set_options(train, [])

__all__ = ["TrainCommand", "train"]

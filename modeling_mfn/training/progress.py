"""One progress bar for a training, in place of a dictionary of figures per logged step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class FeatureProgressCallback(ProgressCallback):
    """Shows the steps of a training in one bar, with the loss and explained variance of the last logged step."""

    def __init__(self, description: str = "training") -> None:
        super().__init__()
        self.description = description

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.description)
            self.training_bar.unit = "step"

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Updates the figures next to the bar. Figures of evaluations stay in the log alone."""
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        figures = f"loss {logs['loss']:.4g}"
        if "explained_variance" in logs:
            figures += f", explained variance {logs['explained_variance']:.1%}"
        self.training_bar.set_postfix_str(figures)


@contextmanager
def showing_progress(trainer: Trainer, description: str = "training") -> Iterator[None]:
    """Makes a trainer show one progress bar and print no logs. The logs stay in `trainer.state.log_history`.

    The bar ends with the context, also after an error.
    """
    for own in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(own)
    progress = FeatureProgressCallback(description)
    trainer.add_callback(progress)
    try:
        yield
    finally:
        if progress.training_bar is not None:
            progress.training_bar.close()


__all__ = ["FeatureProgressCallback", "showing_progress"]

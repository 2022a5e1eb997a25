"""Progress bar of a training."""

import re

from conftest import make_base, make_mfn
from trainings import arguments, rows
from transformers import PrinterCallback, ProgressCallback

from modeling_mfn import MFNTrainer
from modeling_mfn.training.progress import FeatureProgressCallback, showing_progress


def test_one_bar_has_the_loss_and_explained_variance(tmp_path, capsys):
    """The bar ends with the last figures, and nothing else is printed, with either value of `disable_tqdm`."""
    for disable_tqdm in (True, False):
        settings = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        args = arguments(tmp_path, **settings, disable_tqdm=disable_tqdm)
        trainer = MFNTrainer(
            make_mfn(make_base("llama-tied"), alpha=0.0), args, train_dataset=rows(16), eval_dataset=rows(4)
        )
        with showing_progress(trainer, "learning"):
            shown = [each for each in trainer.callback_handler.callbacks if isinstance(each, ProgressCallback)]
            assert [type(each) for each in shown] == [FeatureProgressCallback]
            assert not any(isinstance(each, PrinterCallback) for each in trainer.callback_handler.callbacks)
            trainer.train()
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "{" not in printed.err
        bars = [line for line in re.split(r"[\r\n]", printed.err) if line.startswith("learning: ")]
        last = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
        figures = f"loss {last['loss']:.4g}, explained variance {last['explained_variance']:.1%}"
        assert bars[-1].startswith("learning: 100%")
        assert bars[-1].endswith(f"{figures}]")
        assert trainer.state.log_history[-1]["train_loss"] > 0

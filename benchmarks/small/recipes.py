"""How the MFN models of `predictions.py` are trained, and what `remedies.py` and `sensitivity.py` change about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback

from benchmarks.common import corpora, small_models
from benchmarks.small import fidelity
from modeling_mfn import MFNForCausalLM, MFNTrainer, MFNTrainingArguments

EPOCHS = 2
"""That MFN layers learn alone from cached activations, before the one in which the model learns as a whole."""
JOINT: dict[str, Any] = (
    fidelity.CONTINUE
    | fidelity.RECIPE
    | fidelity.WEIGHTS
    | {"alpha_anneal": 0.25, "mfn_learning_rate": 2e-3, "warmup_steps": 1 / 6}
)
"""`CACHE_FIRST` of `fidelity.py` in shares of the training, plain: with nothing of `Recipe`."""


@dataclass(frozen=True)
class Recipe:
    """What differs from the plain training."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of `MFNTrainingArguments`, for the training as a whole."""
    size: Mapping[str, Any] = field(default_factory=dict)
    """Of `MFNConfig`."""
    epochs: int = EPOCHS
    shared: Literal["nothing", "first dictionary", "learnt dictionary"] = "nothing"
    """What models of all seeds have of seed 0: where their dictionary starts, or what it learns alone."""
    unfamiliar: float = 0.0
    """Share of the tokens that are random ones where MFN layers learn alone."""
    unfamiliar_windows: float = 0.0
    """Share of the windows where the model learns as a whole that have `unfamiliar` random tokens, too, and labels of
    -100, so that they are for features alone."""
    alpha_noise: float = 0.0
    """Standard deviation of alpha around its schedule, within 0 and 1."""

    def changes(self) -> dict[str, Any]:
        """The fields that differ from the plain training."""
        plain = asdict(Recipe())
        return {name: value for name, value in asdict(self).items() if value != plain[name]}

    def with_settings(self, **settings: Any) -> Recipe:
        """The same but for these."""
        return replace(self, settings={**self.settings, **settings})

    def starts_from(self, seed: int) -> int:
        """The seed whose dictionary and text a model of a seed starts from."""
        return seed if self.shared == "nothing" else 0

    def learns_alone(self, seed: int) -> int:
        """The seed whose text its MFN layers learn from, alone."""
        return 0 if self.shared == "learnt dictionary" else seed


STUDY = Recipe({"stability_pass": "model", "lambda_stab": 2.5})
"""The study's: what helped P4 in `remedies.py`, and cost other predictions next to nothing."""
ONE_DOMAIN = replace(STUDY, unfamiliar=0.3, unfamiliar_windows=1 / 3)
"""The study's where text is of one domain: what helped P5."""


def training() -> dict[str, Any]:
    """What models are trained with where no recipe differs."""
    of_all = {"batch": fidelity.BATCH, "optimizer": small_models.OPTIMIZER}
    return of_all | {"from_cache": fidelity.FROM_CACHE, "joint": JOINT}


def train_alone(
    base: Path, text: Callable[[int], Dataset], seed: int, *, size: Mapping[str, Any], recipe: Recipe
) -> MFNForCausalLM:
    """A model whose MFN layers have learnt from the cache, and whose backbone is the base model's.

    Args:
        base: folder of the base model.
        text: training windows for a seed.
        seed: of the model.
        size: of `MFNConfig`.
        recipe: what differs.
    """
    start, alone = recipe.starts_from(seed), recipe.learns_alone(seed)
    torch.manual_seed(start)
    calibration = {"input_ids": torch.tensor(text(start)[:16]["input_ids"])}
    settings = {**size, **recipe.size}
    model = MFNForCausalLM.from_base(base, calibration=calibration, base_kwargs={"dtype": torch.float32}, **settings)
    rows = with_random_tokens(text(alone), recipe.unfamiliar, model.config.vocab_size, alone)
    fidelity.learn_from_cache(model, rows, recipe.epochs, alone)
    return model


def train_together(
    model: MFNForCausalLM, rows: Dataset, seed: int, folder: Path, *, learning_rate: float, recipe: Recipe
) -> MFNForCausalLM:
    """The model that `train_alone` gave, after a training of all of it to alpha = 1.

    Args:
        model: is changed.
        rows: training windows.
        seed: of their order.
        folder: for what the trainer writes.
        learning_rate: of the backbone.
        recipe: what differs.
    """
    rows = with_random_windows(rows, recipe.unfamiliar_windows, recipe.unfamiliar, model.config.vocab_size, seed)
    chosen = small_models.training_settings(rows, fidelity.BATCH, seed) | JOINT
    chosen |= {"learning_rate": learning_rate, **recipe.settings}
    arguments = MFNTrainingArguments(output_dir=str(folder), **chosen)
    callbacks = [AlphaNoise(recipe.alpha_noise, seed)] if recipe.alpha_noise else []
    MFNTrainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
    model.set_blend(arguments.alpha_end)
    return model


def with_random_tokens(rows: Dataset, share: float, vocabulary: int, seed: int) -> Dataset:
    """The windows with a share of the tokens replaced by any of the vocabulary."""
    if not share:
        return rows
    generator = np.random.default_rng(seed)
    tokens = np.array(rows["input_ids"])
    chosen = generator.random(tokens.shape) < share
    return corpora.as_data_set(np.where(chosen, generator.integers(0, vocabulary, tokens.shape), tokens))


def with_random_windows(rows: Dataset, windows: float, share: float, vocabulary: int, seed: int) -> Dataset:
    """The windows, of which a share has a share of its tokens replaced by any of the vocabulary, and has labels of
    -100."""
    if not windows:
        return rows
    clean, mixed = (np.array(of["input_ids"]) for of in (rows, with_random_tokens(rows, share, vocabulary, seed)))
    chosen = np.random.default_rng(seed + 1).random((len(clean), 1)) < windows
    labels = np.where(chosen, -100, clean)
    return Dataset.from_dict({"input_ids": np.where(chosen, mixed, clean), "labels": labels})


class AlphaNoise(TrainerCallback):
    """Lets alpha of a step lie beside what the schedule says."""

    def __init__(self, deviation: float, seed: int) -> None:
        self.deviation, self.generator = deviation, np.random.default_rng(seed)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the forward pass; the schedule sets its own value again after the step."""
        model = kwargs["model"]
        alpha = args.alpha_schedule(state.max_steps).at(state.global_step)
        model.set_blend(float(np.clip(alpha + self.generator.normal(0, self.deviation), 0, 1)))

"""Training of the MFN models of `predictions.py`, with the changes that `remedies.py` and `sensitivity.py` try."""

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
"""Epochs in which MFN layers learn on their own from cached activations. One epoch of the whole model follows."""
JOINT: dict[str, Any] = (
    fidelity.CONTINUE
    | fidelity.RECIPE
    | fidelity.WEIGHTS
    | {"alpha_anneal": 0.25, "mfn_learning_rate": 2e-3, "warmup_steps": 1 / 6}
)
"""Training arguments of the joint training where `Recipe` changes nothing. Durations are shares of the training."""
WHITENING_ROWS = 64
"""Windows that a whitening is computed from."""
REALIGNMENT: dict[str, Any] = {
    "trainable": "mfn",
    "lambda_util": 0.0,
    "lambda_recon": fidelity.RECIPE["lambda_recon"],
    "alpha_start": 1.0,
    "learning_rate": JOINT["mfn_learning_rate"],
    "lr_scheduler_type": "linear",
    "warmup_steps": JOINT["warmup_steps"],
}
"""Training arguments of MFN layers that go on with another text, inside the model."""


@dataclass(frozen=True)
class Recipe:
    """Differences from the plain training, in which every field has its default."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `MFNTrainingArguments` in the joint training."""
    size: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `MFNConfig`."""
    epochs: int = EPOCHS
    """Epochs of MFN layers on their own."""
    alone: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `MFNTrainingArguments` while MFN layers learn on their own."""
    shared: Literal["nothing", "first dictionary", "learnt dictionary"] = "nothing"
    """Part of seed 0 that models of all seeds share: nothing, its initial dictionary, or the dictionary that its MFN
    layers learnt on their own."""
    unfamiliar: float = 0.0
    """Share of tokens that are replaced by random ones while MFN layers learn on their own."""
    unfamiliar_windows: float = 0.0
    """Share of windows of the joint training that have a share `unfamiliar` of random tokens, and no labels.
    Such windows train features alone."""
    alpha_noise: float = 0.0
    """Standard deviation of alpha around its schedule. Alpha stays within 0 and 1."""
    aligned: bool = False
    """True to keep the product of each feature's encoder row and its direction at 1."""
    whitened: bool = False
    """True to measure what a reconstruction lacks after whitening: every direction of the update counts as much."""
    other_text: float = 0.0
    """Share of windows that come from other domains in a training on one. They have no labels, so that they train
    features alone."""
    realigned: bool = False
    """True to train the MFN layers once more, alone and without labels, on the domain that they are measured on."""

    def changes(self, plain: Recipe | None = None) -> dict[str, Any]:
        """Fields that differ from another recipe, by default from the plain training."""
        before = asdict(plain or Recipe())
        return {name: value for name, value in asdict(self).items() if value != before[name]}

    def with_settings(self, **settings: Any) -> Recipe:
        """Copy of this recipe with some training arguments replaced."""
        return replace(self, settings={**self.settings, **settings})

    def starts_from(self, seed: int) -> int:
        """Seed of the initial dictionary, and of the text that it is fitted to."""
        return seed if self.shared == "nothing" else 0

    def learns_alone(self, seed: int) -> int:
        """Seed of the text that MFN layers learn from on their own."""
        return 0 if self.shared == "learnt dictionary" else seed


STUDY = Recipe({"stability_pass": "model", "lambda_stab": 2.5})
"""Recipe of the study. In `remedies.py` this recipe helped P4 at almost no cost to other predictions."""
ONE_DOMAIN = replace(STUDY, unfamiliar=0.3, unfamiliar_windows=1 / 3)
"""Recipe of the study for models of one domain. In `remedies.py` its random tokens helped P5."""


def training() -> dict[str, Any]:
    """Settings of the plain training, as results record them."""
    of_all = {"batch": fidelity.BATCH, "optimizer": small_models.OPTIMIZER}
    return of_all | {"from_cache": fidelity.FROM_CACHE, "joint": JOINT}


def train_alone(
    base: Path, text: Callable[[int], Dataset], seed: int, *, size: Mapping[str, Any], recipe: Recipe
) -> MFNForCausalLM:
    """Trains MFN layers on their own, from cached activations of the base model.

    Args:
        base: folder of the base model.
        text: seed -> training windows.
        seed: seed of the model.
        size: fields of `MFNConfig`.
        recipe: differences from the plain training.

    Returns:
        The base model with trained MFN layers.
    """
    start, alone = recipe.starts_from(seed), recipe.learns_alone(seed)
    torch.manual_seed(start)
    calibration = {"input_ids": torch.tensor(text(start)[:16]["input_ids"])}
    settings = {**size, **recipe.size}
    model = MFNForCausalLM.from_base(base, calibration=calibration, base_kwargs={"dtype": torch.float32}, **settings)
    rows = with_random_tokens(text(alone), recipe.unfamiliar, model.config.vocab_size, alone)
    callbacks = [Aligned()] if recipe.aligned else []
    trainer = whitening_trainer(model, rows) if recipe.whitened else MFNTrainer
    fidelity.learn_from_cache(model, rows, recipe.epochs, alone, callbacks, trainer, **recipe.alone)
    return model


def train_together(
    model: MFNForCausalLM, rows: Dataset, seed: int, folder: Path, *, learning_rate: float, recipe: Recipe
) -> MFNForCausalLM:
    """Trains the whole model to alpha = 1.

    Args:
        model: result of [`train_alone`]; changed in place.
        rows: training windows.
        seed: seed of the order of the windows.
        folder: output folder of the trainer.
        learning_rate: learning rate of the backbone.
        recipe: differences from the plain training.

    Returns:
        The model, now trained.
    """
    rows = with_random_windows(rows, recipe.unfamiliar_windows, recipe.unfamiliar, model.config.vocab_size, seed)
    chosen = small_models.training_settings(rows, fidelity.BATCH, seed) | JOINT
    chosen |= {"learning_rate": learning_rate, **recipe.settings}
    arguments = MFNTrainingArguments(output_dir=str(folder), **chosen)
    callbacks: list[TrainerCallback] = [AlphaNoise(recipe.alpha_noise, seed)] if recipe.alpha_noise else []
    callbacks += [Aligned()] if recipe.aligned else []
    trainer = whitening_trainer(model, rows) if recipe.whitened else MFNTrainer
    trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
    model.set_blend(arguments.alpha_end)
    return model


@torch.no_grad()
def whitening_trainer(model: MFNForCausalLM, rows: Dataset) -> type[MFNTrainer]:
    """Trainer whose reconstruction and auxiliary losses are those of whitened vectors.

    A vector is multiplied by C^(-1/2), where C has the second moments of a layer's encoder input on the first rows. A
    hundredth of C's mean diagonal is added to its diagonal.
    """
    tokens = torch.tensor(rows[:WHITENING_ROWS]["input_ids"])
    items, maps = model(tokens, output_reconstructions=True, logits_to_keep=1).reconstructions, {}
    for number, item in items.items():
        x = model.mfn_layers[number].standardise(item.residual).x.flatten(0, 1)
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        maps[number] = (vectors / (values + 0.01 * values.mean()).sqrt()) @ vectors.T

    class WhiteningTrainer(MFNTrainer):
        def _layer_losses(self, model: Any, seen: Any) -> Any:
            whitened = {}
            for number, item in seen.reconstructions.items():
                parts = {name: getattr(item, name) for name in ("residual", "reconstructed", "revived")}
                parts = {name: part @ maps[number] for name, part in parts.items() if part is not None}
                whitened[number] = item._replace(**parts)
            return super()._layer_losses(model, replace(seen, reconstructions=whitened))

    return WhiteningTrainer


def realign(model: MFNForCausalLM, rows: Dataset, seed: int, folder: Path) -> MFNForCausalLM:
    """Trains the MFN layers of a model at alpha = 1 to reconstruct another text, in place. Labels play no part."""
    settings = small_models.training_settings(rows, fidelity.BATCH, seed) | REALIGNMENT
    MFNTrainer(model, MFNTrainingArguments(output_dir=str(folder), **settings), train_dataset=rows).train()
    return model


def with_other_windows(rows: Dataset, others: Dataset, share: float, seed: int) -> Dataset:
    """Replaces a share of the windows by those of `others` in the same places. Labels of these windows become -100."""
    own, other = (np.array(of["input_ids"]) for of in (rows, others))
    chosen = np.random.default_rng(seed).random((len(own), 1)) < share
    labels = np.where(chosen, -100, np.array(rows["labels"]))
    return Dataset.from_dict({"input_ids": np.where(chosen, other[: len(own)], own), "labels": labels})


def with_random_tokens(rows: Dataset, share: float, vocabulary: int, seed: int) -> Dataset:
    """Replaces a share of the tokens by random ones of the vocabulary."""
    if not share:
        return rows
    generator = np.random.default_rng(seed)
    tokens = np.array(rows["input_ids"])
    chosen = generator.random(tokens.shape) < share
    return corpora.as_data_set(np.where(chosen, generator.integers(0, vocabulary, tokens.shape), tokens))


def with_random_windows(rows: Dataset, windows: float, share: float, vocabulary: int, seed: int) -> Dataset:
    """Replaces a share of the tokens by random ones in a share of the windows. Labels of these windows become -100."""
    if not windows:
        return rows
    return with_other_windows(rows, with_random_tokens(rows, share, vocabulary, seed), windows, seed + 1)


class AlphaNoise(TrainerCallback):
    """Adds noise to the alpha of each training step."""

    def __init__(self, deviation: float, seed: int) -> None:
        self.deviation, self.generator = deviation, np.random.default_rng(seed)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets a noisy alpha for the step. After the step the schedule sets its own value again."""
        model = kwargs["model"]
        alpha = args.alpha_schedule(state.max_steps).at(state.global_step)
        model.set_blend(float(np.clip(alpha + self.generator.normal(0, self.deviation), 0, 1)))


class Aligned(TrainerCallback):
    """Keeps <e, d> = 1 for each feature's encoder row e and direction d.

    A feature's activation is then the length of its own direction in the input, where no other feature is present.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Aligns the initial rows."""
        self.on_step_end(args, state, control, **kwargs)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves each encoder row along its direction."""
        for layer in kwargs["model"].mfn_layers.values():
            rows, directions = layer.encoder.weight, layer.decoder.weight
            rows += (1 - (rows * directions).sum(-1, keepdim=True)) * directions

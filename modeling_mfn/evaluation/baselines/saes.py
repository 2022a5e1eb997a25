"""Sparse autoencoders (SAEs) that MFN models are compared with.

Each is an `MFNForCausalLM` whose backbone is the frozen base model. At alpha = 0, its default, it equals the base model
bit for bit, and its codes are the codes of the SAE. At alpha = 1 the SAE is spliced in.

The recipe is that of Gao et al. 2024 (arXiv:2406.04093), as in EleutherAI's sparsify and SAELens:

- TopK, with the encoder tied to the decoder at the start and the mean of the data as the first decoder bias;
- decoder rows of unit norm, and an auxiliary loss for silent features;
- Adam with warm-up and a decaying learning rate.

Dead features start again from the reconstruction error (after Bricken et al. 2023). Residual streams are standardised
token by token unless `input_norm="none"`. `benchmarks/smollm2/sae_parity.py` compares the result with sparsify.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Subset
from transformers import PreTrainedModel

from ...model.mfn_for_causal_lm import MFNForCausalLM
from ...training.activation_cache import ActivationCache, CachedResiduals
from ...training.arguments import MFNTrainingArguments
from ...training.progress import showing_progress
from ...training.trainer import MFNTrainer

CALIBRATION_WINDOWS = 16
"""Windows to which biases and the scale are fitted at the start."""
BATCH_TOKENS = 2048
"""Approximate number of tokens in a training step."""
LEARNING_RATE, TUNING_RATE = 1e-2, 4e-3
"""Peak learning rates of a new SAE, and of fine-tuning."""
RECIPE: dict[str, Any] = {
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "adam_beta2": 0.99,
    "rate_window": 20_000,
    "reinit_dead_every": 10,
}
"""Settings of `MFNTrainingArguments`. A feature that is silent for `rate_window` tokens is dead."""
RECONSTRUCTION_ALONE: dict[str, Any] = {
    "trainable": "mfn",
    "alpha_end": 0.0,
    "lambda_recon": 1.0,
    **{f"lambda_{loss}": 0.0 for loss in ("rate", "comp", "stab", "util")},
}
"""Settings of `MFNTrainingArguments` that make the reconstruction loss the only one."""


def random_sae(
    base: PreTrainedModel | str | os.PathLike[str],
    windows: Dataset,
    *,
    num_features: int,
    k: int,
    layers: str | list[int] = "all",
    seed: int = 0,
    **settings: Any,
) -> MFNForCausalLM:
    """Makes an untrained SAE: random directions, with biases and scale fitted to the first windows.

    Args:
        base: base model, or its folder or Hub id, which is loaded in float32.
        windows: rows with `input_ids` (T,), without padding.
        num_features: m.
        k: active features per token.
        layers: blocks with an SAE, which is at the place of an MFN layer.
        seed: seed of the directions.
        settings: further settings of `MFNConfig`.

    Raises:
        ValueError: if a window is padded.
    """
    _check_windows(windows)
    torch.manual_seed(seed)
    tokens = torch.tensor(windows[:CALIBRATION_WINDOWS]["input_ids"])
    if isinstance(base, PreTrainedModel):
        tokens = tokens.to(base.device)
    settings = {"codes": "stream"} | settings | {"layers": layers, "num_features": num_features, "k": k}
    in_float32 = None if isinstance(base, PreTrainedModel) else {"dtype": torch.float32}
    return MFNForCausalLM.from_base(base, calibration={"input_ids": tokens}, base_kwargs=in_float32, **settings)


def post_hoc_sae(
    base: PreTrainedModel | str | os.PathLike[str],
    windows: Dataset,
    *,
    num_features: int,
    k: int,
    layers: str | list[int] = "all",
    epochs: int = 1,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    cache: ActivationCache | None = None,
    folder: str | Path | None = None,
    **settings: Any,
) -> MFNForCausalLM:
    """Trains TopK SAEs of some blocks on the residual streams of the frozen base model.

    Args:
        base, windows, num_features, k, layers, settings: see [`random_sae`].
        epochs: number of passes through the windows, each in another random order.
        learning_rate: peak learning rate.
        seed: seed of the directions and of the order.
        cache: activations of these windows, layers and base. With it the base model runs once for SAEs of many seeds.
            By default it is written, and removed at the end.
        folder: folder for that cache, by default among the temporary files. A token takes layers x d x 2 bytes.

    Raises:
        ValueError: if a window is padded, or the cache is of other windows or layers.
    """
    sae = random_sae(base, windows, num_features=num_features, k=k, layers=layers, seed=seed, **settings)
    _learn(sae, windows, cache, folder, epochs, learning_rate, seed)
    return sae


def fine_tune_sae(
    sae: MFNForCausalLM,
    windows: Dataset,
    *,
    epochs: int = 1,
    learning_rate: float = TUNING_RATE,
    seed: int = 0,
    cache: ActivationCache | None = None,
    folder: str | Path | None = None,
) -> MFNForCausalLM:
    """Trains a copy of an SAE on other windows, such as those of another domain.

    The arguments are those of [`post_hoc_sae`]. The optimizer starts anew, with its own warm-up.
    """
    _check_windows(windows)
    tuned = copy.deepcopy(sae)
    _learn(tuned, windows, cache, folder, epochs, learning_rate, seed)
    return tuned


def train_sae(
    sae: MFNForCausalLM,
    cache: ActivationCache,
    rows: Sequence[int],
    *,
    learning_rate: float,
    batch_size: int,
    seed: int = 0,
    **arguments: Any,
) -> None:
    """Trains the MFN layers of a model in place, in float32, to reconstruct cached residual streams and nothing else.

    Args:
        sae: model to train.
        cache: cached residual streams of this model.
        rows: rows of the cache, in the order of training.
        learning_rate: peak learning rate.
        batch_size: rows per step.
        seed: seed of the directions in which dead features start again.
        arguments: settings of `MFNTrainingArguments` that replace those of the recipe.
    """
    device, dtype, steps = sae.device, sae.dtype, len(rows) // batch_size
    layers = CachedResiduals(sae).float()
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": steps,
            "warmup_steps": steps // 20,  # 5 % of the training
            "per_device_train_batch_size": batch_size,
            "learning_rate": learning_rate,
            "train_sampling_strategy": "sequential",
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": device.type == "cpu",
            "dataloader_pin_memory": False,
            "seed": seed,
        }
        chosen = MFNTrainingArguments(**(settings | RECIPE | arguments | RECONSTRUCTION_ALONE))
        trainer = MFNTrainer(layers, chosen, train_dataset=Subset(cache, rows))
        with showing_progress(trainer, "SAE"):
            trainer.train()
    layers.to(device, dtype)
    sae.eval()


def training_settings(learning_rate: float) -> dict[str, Any]:
    """Returns the settings of a training, without its model, text, epochs and seed, in types of JSON."""
    sizes = {"calibration_windows": CALIBRATION_WINDOWS, "batch_tokens": BATCH_TOKENS}
    return sizes | {"learning_rate": learning_rate} | RECIPE | RECONSTRUCTION_ALONE


def training_order(rows: int, epochs: int, batch_size: int, seed: int = 0) -> list[int]:
    """Returns the numbers of rows in the order of training, in whole batches: one permutation per epoch.

    Methods that shall see the same text in the same order share it.
    """
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(rows) for _ in range(epochs)])
    return order[: len(order) // batch_size * batch_size].tolist()


def _learn(
    sae: MFNForCausalLM,
    windows: Dataset,
    cache: ActivationCache | None,
    folder: str | Path | None,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> None:
    batch_size = min(len(windows), max(1, BATCH_TOKENS // len(windows[0]["input_ids"])))
    order = training_order(len(windows), epochs, batch_size, seed)
    with _cached(sae, windows, cache, folder) as cache:
        train_sae(sae, cache, order, learning_rate=learning_rate, batch_size=batch_size, seed=seed)


@contextmanager
def _cached(
    sae: MFNForCausalLM, windows: Dataset, cache: ActivationCache | None, folder: str | Path | None
) -> Iterator[ActivationCache]:
    if cache is not None:
        if (cache.layers, len(cache)) != (sae.config.layers, len(windows)):
            raise ValueError(
                f"cache has {len(cache)} windows of layers {cache.layers}; it must be of the {len(windows)} windows "
                f"and layers {sae.config.layers}"
            )
        yield cache
        return
    with tempfile.TemporaryDirectory(dir=folder) as place:
        yield ActivationCache.write(sae, windows, place)


def _check_windows(windows: Dataset) -> None:
    masks = windows[:]["attention_mask"] if "attention_mask" in windows.column_names else []
    if padded := [row for row, mask in enumerate(masks) if not all(mask)]:
        raise ValueError(f"window {padded[0]} is padded; SAEs are trained on windows that are full of text")


__all__ = ["fine_tune_sae", "post_hoc_sae", "random_sae", "train_sae", "training_order", "training_settings"]

"""Study of a real checkpoint: settings, texts, order of training, choice of learning rates."""

from __future__ import annotations

import fnmatch
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.common import corpora, records
from benchmarks.smollm2.splicing import next_token_losses
from modeling_mfn import MFNForCausalLM, MFNTrainer, MFNTrainingArguments
from modeling_mfn.demo.assets import cache_folder, smollm2
from modeling_mfn.evaluation.baselines.saes import training_order
from modeling_mfn.model.modes import at_alpha
from modeling_mfn.training.activation_cache import ActivationCache
from modeling_mfn.training.record import write_record

Rows = Sequence[int]
WINDOW_SETTINGS = ("window", "train_tokens", "joint_tokens", "held_out_tokens", "seed")
"""Settings that determine the windows of text."""
TRY = "try.json"
"""Record of a setting that was tried, next to its model."""
VALIDATION_WINDOWS = 12
"""Windows that training settings are chosen by."""


class Trained(NamedTuple):
    """A trained model, with its `MFNTrainer` if it had one."""

    model: MFNForCausalLM
    trainer: MFNTrainer | None = None


def trained_model() -> Path:
    """Folder of the model of the last stage of `real_checkpoint.py`, with its tokenizer.

    Raises:
        typer.BadParameter: if no stage has trained a model yet.
    """
    for stage in ("joint", "features"):
        if (folder := cache_folder() / "real_checkpoint" / stage).exists():
            AutoTokenizer.from_pretrained(smollm2()).save_pretrained(folder)
            return folder
    raise typer.BadParameter(
        "there is no trained model yet: run python -m benchmarks.smollm2.real_checkpoint, or name a folder"
    )


@dataclass(frozen=True)
class CheckpointStudy:
    """Settings of the study, and the files that depend on them."""

    base: Path
    """Folder of the base model."""
    results: Path
    """Folder of the results."""
    folder: Path
    """Folder of windows, caches and models."""
    layers: tuple[int, ...] = (6, 12, 18, 24)
    num_features: int = 4608
    k: int = 32
    window: int = 256
    train_tokens: int = 200_000
    joint_tokens: int = 40_000
    held_out_tokens: int = 4_096
    """Held-out tokens per domain."""
    epochs: int = 3
    """Epochs of training from the cache."""
    batch: int = 8
    """Windows per step of training from the cache."""
    seed: int = 0

    @cached_property
    def windows(self) -> dict[str, Tensor]:
        """Windows of tokens by name, (rows, T).

        `train`, `joint` and `validation` are disjoint parts of the training text, with an equal share of each domain.
        `held_out` is spread evenly over the held-out text, one domain after the other.
        """
        file, wanted = self.folder / "windows.npz", {name: getattr(self, name) for name in WINDOW_SETTINGS}
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, settings=json.dumps(wanted), **self._cut_windows())
        with np.load(file) as found:
            cut = json.loads(str(found["settings"]))
            if cut != wanted:
                raise ValueError(
                    f"{file} was cut with {cut}, not {wanted}; choose another --name, or delete the folder"
                )
            return {name: torch.from_numpy(found[name]).long() for name in ("train", "joint", "validation", "held_out")}

    def _cut_windows(self) -> dict[str, np.ndarray]:
        tokenizer, generator = AutoTokenizer.from_pretrained(self.base), np.random.default_rng(self.seed)
        tokens = {
            "train": self.train_tokens,
            "joint": self.joint_tokens,
            "validation": VALIDATION_WINDOWS * self.window,
        }
        counts = {name: amount // self.window // len(corpora.DOMAINS) for name, amount in tokens.items()}
        found: dict[str, list[np.ndarray]] = {name: [] for name in (*counts, "held_out")}
        for domain in corpora.DOMAINS:
            train, held_out = (corpora.windows(text, tokenizer, self.window) for text in corpora.texts(domain))
            shares = np.split(generator.permutation(train), np.cumsum(list(counts.values())))
            for name, share in zip(counts, shares, strict=False):
                found[name].append(share)
            places = np.linspace(0, len(held_out) - 1, self.held_out_tokens // self.window).astype(int)
            found["held_out"].append(held_out[places])
        joined = {name: np.concatenate(rows) for name, rows in found.items()}
        return joined | {name: generator.permutation(joined[name]) for name in counts}

    def convert(self, **settings: Any) -> MFNForCausalLM:
        """Base model with new MFN layers, at alpha = 0."""
        torch.manual_seed(self.seed)
        return MFNForCausalLM.from_base(
            self.base,
            layers=list(self.layers),
            **({"num_features": self.num_features, "k": self.k, "codes": "stream"} | settings),
        )

    def settings(self) -> dict[str, Any]:
        """Settings without local paths."""
        return {name: value for name, value in asdict(self).items() if not isinstance(value, Path)}

    def run(
        self,
        stages: Mapping[str, Callable[[CheckpointStudy], dict[str, Any]]],
        module: str,
        only: str = "*",
        threads: int = 1,
    ) -> None:
        """Runs stages, in order, and writes their records.

        Args:
            stages: name -> function that returns figures.
            module: module of the command line, for the records.
            only: pattern that names of stages must match. Stages with a result are left out.
            threads: number of threads, for the records.
        """
        for name, stage in stages.items():
            file = self.results / f"{name}.json"
            if not fnmatch.fnmatch(name, only) or file.exists():
                continue
            print(name, flush=True)
            begun = time.time()
            record = {"command": records.command_line(module), "commit": records.COMMIT} | stage(self)
            record |= {"settings": self.settings(), "threads": threads, "minutes": round((time.time() - begun) / 60, 1)}
            records.write_record(file, record)

    def result(self, stage: str) -> dict[str, Any]:
        """Record of a stage."""
        return records.read_record(self.results / f"{stage}.json")

    def cache(self, part: str) -> ActivationCache:
        """Cached residual streams of `train` or `held_out`."""
        return ActivationCache(self.folder / "cache" / part)

    def order(self) -> list[int]:
        """Rows of the cache in the order of training. Every method has the same order."""
        return training_order(len(self.windows["train"]), self.epochs, self.batch, self.seed)

    def arguments(self, rows: Rows, batch: int, **settings: Any) -> MFNTrainingArguments:
        """Training arguments of one pass over rows that trains the MFN layers alone. `settings` take precedence."""
        steps = len(rows) // batch
        common = {
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "train_sampling_strategy": "sequential",
            "lr_scheduler_type": "cosine",
            "warmup_steps": steps // 20,
            "trainable": "mfn",
            "logging_steps": max(1, steps // 20),
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            "seed": self.seed,
        }
        return MFNTrainingArguments(output_dir=str(self.folder / "training"), **(common | settings))

    def fit(
        self, stage: str, train: Callable[..., Trained], tries: list[dict[str, Any]], order: Rows, batch: int
    ) -> dict[str, Any]:
        """Trains with each of some settings and keeps the best model.

        The best model has the least next-token loss on the validation windows, with all blocks read through features.
        All rows of `order` are used for each setting, because the best settings on a part of the rows are not the best
        on all. An interrupted call, repeated, tries only the settings that are left.

        Args:
            stage: name of the stage.
            train: function that trains a model on rows with given settings.
            tries: settings to try.
            order: rows of the cache, in the order of training.
            batch: rows per step.
        """
        folders = [self.folder / "tries" / f"{stage}-{number}" for number in range(len(tries))]
        tried = [self._try(folder, train, settings, order) for folder, settings in zip(folders, tries, strict=True)]
        best = min(range(len(tries)), key=lambda number: tried[number]["validation_loss"])
        shutil.rmtree(self.folder / stage, ignore_errors=True)
        (folders[best] / TRY).unlink()
        folders[best].rename(self.folder / stage)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if not any((self.folder / "tries").iterdir()):
            (self.folder / "tries").rmdir()
        chosen = tried[best]
        return {
            "tried": tried,
            "chosen": chosen["settings"],
            "tokens": len(order) * self.window,
            "training_minutes": chosen["training_minutes"],
            "validation_loss": chosen["validation_loss"],
        }

    def _try(
        self, folder: Path, train: Callable[..., Trained], settings: dict[str, Any], order: Rows
    ) -> dict[str, Any]:
        """Trains with one setting, saves the model in the folder and returns the record.

        An existing record of this setting is returned without training.
        """
        file = folder / TRY
        if file.exists() and records.read_record(file)["settings"] == settings:
            return records.read_record(file)
        begun = time.time()
        model, trainer = train(order, **settings)
        minutes, loss = round((time.time() - begun) / 60, 1), self.validation_loss(model)
        model.save_pretrained(folder)
        if trainer is not None:
            write_record(folder, trainer.args, trainer.state, model.config)
        record = {"settings": settings, "validation_loss": loss, "training_minutes": minutes}
        records.write_record(file, record)
        print(record, flush=True)
        return record

    def base_losses(self, model: MFNForCausalLM) -> Tensor:
        """Next-token losses of the base model on the held-out windows, (rows, T - 1).

        Args:
            model: a model at alpha = 0.
        """
        file = self.folder / "base_losses.npy"
        if not file.exists():
            np.save(file, next_token_losses(model, self.windows["held_out"], description="base").numpy())
        return torch.from_numpy(np.load(file))

    def validation_loss(self, model: MFNForCausalLM) -> float:
        """Next-token loss in nats per token on the validation windows, with all blocks read through features."""
        with at_alpha(model.eval(), 1.0):
            return round(float(next_token_losses(model, self.windows["validation"]).mean()), 4)

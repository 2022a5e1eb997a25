"""What the stages of `real_checkpoint.py` share: settings, texts, order of training, choice of learning rates."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.common import corpora
from benchmarks.smollm2.splicing import next_token_losses
from modeling_mfn import MFNForCausalLM, MFNTrainer, MFNTrainingArguments
from modeling_mfn.demo.assets import cache_folder, smollm2
from modeling_mfn.evaluation.baselines.saes import training_order
from modeling_mfn.model.modes import at_alpha
from modeling_mfn.training.activation_cache import ActivationCache
from modeling_mfn.training.record import write_record

Rows = Sequence[int]
CUT = ("window", "train_tokens", "joint_tokens", "held_out_tokens", "seed")
"""Settings that say which windows of text there are."""
VALIDATION_WINDOWS = 12
"""That settings are chosen by."""


class Trained(NamedTuple):
    """A model, and the trainer that has the record of its training, if it was one of ours."""

    model: MFNForCausalLM
    trainer: MFNTrainer | None = None


def trained_model() -> Path:
    """Folder of the model that `real_checkpoint.py` keeps, of the last stage that was run; gets the tokenizer, too."""
    for stage in ("joint", "features"):
        if (folder := cache_folder() / "real_checkpoint" / stage).exists():
            AutoTokenizer.from_pretrained(smollm2()).save_pretrained(folder)
            return folder
    raise typer.BadParameter(
        "there is no trained model yet: run benchmarks/smollm2/real_checkpoint.py, or name a folder"
    )


@dataclass(frozen=True)
class Study:
    """The settings, and what follows from them."""

    base: Path
    results: Path
    folder: Path
    """For windows, caches and models."""
    layers: tuple[int, ...] = (6, 12, 18, 24)
    num_features: int = 4608
    k: int = 32
    window: int = 256
    train_tokens: int = 200_000
    joint_tokens: int = 40_000
    held_out_tokens: int = 4_096
    """A domain."""
    epochs: int = 3
    batch: int = 8
    """Windows a step of training from the cache."""
    seed: int = 0

    @cached_property
    def windows(self) -> dict[str, Tensor]:
        """Windows of tokens, (rows, T): `train`, `joint` and `validation` are different ones of the training text, in
        equal shares of the domains; `held_out` are spread evenly over held-out text, one domain after the other."""
        file, wanted = self.folder / "windows.npz", {name: getattr(self, name) for name in CUT}
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
        """The base model with new MFN layers, at alpha = 0."""
        torch.manual_seed(self.seed)
        return MFNForCausalLM.from_base(
            self.base, layers=list(self.layers), **({"num_features": self.num_features, "k": self.k} | settings)
        )

    def settings(self) -> dict[str, Any]:
        """Without this machine's folders."""
        return {name: value for name, value in asdict(self).items() if not isinstance(value, Path)}

    def result(self, stage: str) -> dict[str, Any]:
        return json.loads((self.results / f"{stage}.json").read_text(encoding="utf-8"))

    def cache(self, part: str) -> ActivationCache:
        return ActivationCache(self.folder / "cache" / part)

    def order(self) -> list[int]:
        """Rows of the cache in the order of training, the same for every method."""
        return training_order(len(self.windows["train"]), self.epochs, self.batch, self.seed)

    def arguments(self, rows: Rows, batch: int, **settings: Any) -> MFNTrainingArguments:
        """Of one pass over rows, for the MFN layers alone; settings go before those that all have in common."""
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
        """Trains with each of some settings on all rows of `order`, since those that are best on a part of them are
        not so on all, and keeps the model whose features, read in all blocks, leave the least next-token loss on the
        validation windows. A setting that has its record already is not tried again."""
        records = []
        for number, settings in enumerate(tries):
            name = f"tries/{stage}-{number}"
            file, folder = self.results / f"{name}.json", self.folder / name
            if not (folder.exists() and file.exists() and self.result(name)["settings"] == settings):
                begun = time.time()
                model, trainer = train(order, **settings)
                minutes, loss = round((time.time() - begun) / 60, 1), self.validation_loss(model)
                model.save_pretrained(folder)
                if trainer is not None:
                    write_record(folder, trainer.args, trainer.state, model.config)
                file.parent.mkdir(parents=True, exist_ok=True)
                record = {"settings": settings, "validation_loss": loss, "training_minutes": minutes}
                file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
                print(record, flush=True)
            records.append(self.result(name))
        best = min(range(len(tries)), key=lambda number: records[number]["validation_loss"])
        shutil.rmtree(self.folder / stage, ignore_errors=True)
        (self.folder / "tries" / f"{stage}-{best}").rename(self.folder / stage)
        for number in set(range(len(tries))) - {best}:
            shutil.rmtree(self.folder / "tries" / f"{stage}-{number}")
        if not any((self.folder / "tries").iterdir()):
            (self.folder / "tries").rmdir()
        chosen = records[best]
        return {
            "tried": records,
            "chosen": chosen["settings"],
            "tokens": len(order) * self.window,
            "training_minutes": chosen["training_minutes"],
            "validation_loss": chosen["validation_loss"],
        }

    def base_losses(self, model: MFNForCausalLM) -> Tensor:
        """Of the held-out windows, (rows, T - 1), by a model at alpha = 0."""
        file = self.folder / "base_losses.npy"
        if not file.exists():
            np.save(file, next_token_losses(model, self.windows["held_out"], description="base").numpy())
        return torch.from_numpy(np.load(file))

    def validation_loss(self, model: MFNForCausalLM) -> float:
        """Nats a token with all MFN layers read."""
        with at_alpha(model.eval(), 1.0):
            return round(float(next_token_losses(model, self.windows["validation"]).mean()), 4)

"""Baselines of one base model. Each is trained when it is first asked for, and kept in a folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from ...model.mfn_for_causal_lm import MFNForCausalLM
from ...utils.files import replace_folder
from ..predictions.p5_transfer import Transfer
from ..result import FINE_TUNED_SAE, MFN, POST_HOC_SAE, RANDOM_SAE, Subjects
from .saes import (
    CALIBRATION_WINDOWS,
    LEARNING_RATE,
    TUNING_RATE,
    fine_tune_sae,
    post_hoc_sae,
    random_sae,
    training_settings,
)

MADE_FROM = "made_from.json"


@dataclass
class BaselineModels:
    """Post-hoc SAEs and random SAEs of several seeds, trained on one domain or on all."""

    base: str | os.PathLike[str]
    """Folder or Hub id of the base model."""
    rows: Callable[[str | None, int], Dataset]
    """(domain, seed) -> training windows of the domain, or of all domains for `None`."""
    size: Mapping[str, Any]
    """`layers`, `num_features`, `k` and other settings of `MFNConfig`."""
    epochs: int
    """Number of passes of training through the windows."""
    folder: Path
    """Folder for the trained models."""

    @cached_property
    def base_model(self) -> PreTrainedModel:
        """Base model in float32, the precision of SAEs and of the training of MFN models."""
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    @cached_property
    def base_digest(self) -> str:
        """Digest of the base model's weights."""
        return digest_of(self.base_model)

    def kept(self, name: str, made_from: Mapping[str, Any], train: Callable[[], PreTrainedModel]) -> Any:
        """Returns the model of this name from the folder. Trains it first if there is none that was made from the same.

        Args:
            name: name of its folder.
            made_from: settings and digests that tell this training from others, in types of JSON.
            train: function that trains it.
        """
        folder = self.folder / name
        record = json.dumps({"base": self.base_digest, "size": dict(self.size)} | dict(made_from), default=list)
        if not (folder / MADE_FROM).exists() or (folder / MADE_FROM).read_text(encoding="utf-8") != record:
            Console().print(f"training {name}", markup=False, highlight=False)
            part = folder.with_name(f".{name}.part")
            shutil.rmtree(part, ignore_errors=True)
            train().save_pretrained(part)
            (part / MADE_FROM).write_text(record, encoding="utf-8")
            replace_folder(part, folder)
        return AutoModelForCausalLM.from_pretrained(folder)

    def sae(self, seed: int, domain: str | None = None, base: PreTrainedModel | None = None) -> MFNForCausalLM:
        """Returns a post-hoc SAE that learnt from a domain, or from all.

        Args:
            seed: seed of its directions and of the order of windows.
            domain: name of the domain, `None` for all.
            base: model of the base model's size to train it on, instead of the base model.
        """
        rows = self.rows(domain, seed)
        made_from = {"epochs": self.epochs, "training": training_settings(LEARNING_RATE), "text": digest_of_rows(rows)}
        return self.kept(
            f"sae-{domain or 'all'}{'-of-dense' if base is not None else ''}-seed-{seed}",
            made_from | {"of": None if base is None else digest_of(base)},
            lambda: post_hoc_sae(self.base if base is None else base, rows, epochs=self.epochs, seed=seed, **self.size),
        )

    def tuned_sae(self, seed: int, sae: MFNForCausalLM, domain: str) -> MFNForCausalLM:
        """Returns an SAE after one more pass, through the windows of another domain."""
        rows = self.rows(domain, seed)
        return self.kept(
            f"sae-tuned-on-{domain}-seed-{seed}",
            {"training": training_settings(TUNING_RATE), "text": digest_of_rows(rows), "of": digest_of(sae)},
            lambda: fine_tune_sae(sae, rows, seed=seed),
        )

    def random(self, seed: int) -> MFNForCausalLM:
        """Returns an untrained SAE."""
        rows = self.rows(None, seed)
        return self.kept(
            f"random-seed-{seed}",
            {"calibration_windows": CALIBRATION_WINDOWS, "text": digest_of_rows(rows)},
            lambda: random_sae(self.base, rows, seed=seed, **self.size),
        )

    def subjects(self, seeds: int, domain: str | None = None) -> Subjects:
        """Returns post-hoc SAEs of this number of seeds, and random SAEs of at most two."""
        return {
            POST_HOC_SAE: [self.sae(seed, domain) for seed in range(seeds)],
            RANDOM_SAE: [self.random(seed) for seed in range(min(seeds, 2))],
        }

    def transfers(
        self,
        source: str,
        targets: Sequence[str],
        models: Sequence[MFNForCausalLM],
        dense: Sequence[PreTrainedModel | None],
    ) -> dict[str, list[Transfer]]:
        """Returns the subjects of P5.

        Each MFN model has a dense counterpart. An SAE that learnt from the same source is trained on that counterpart,
        so that both lose against the same dense model. Fine-tuned SAEs go on from there on each target.

        Args:
            source: domain that the models learnt from.
            targets: other domains.
            models: MFN models, one per seed.
            dense: their dense counterparts, `None` for the base model.
        """
        saes = [self.sae(seed, source, of) for seed, of in enumerate(dense)]
        tuned = [{domain: self.tuned_sae(seed, sae, domain) for domain in targets} for seed, sae in enumerate(saes)]
        return {
            MFN: [Transfer(source, *pair) for pair in zip(models, dense, strict=True)],
            POST_HOC_SAE: [Transfer(source, sae) for sae in saes],
            FINE_TUNED_SAE: [Transfer(source, sae, tuned=own) for sae, own in zip(saes, tuned, strict=True)],
        }


def digest_of(model: PreTrainedModel) -> str:
    """Digest of a model's weights, from the sums of each tensor and of its squares."""
    sums = [[float(t.double().sum()), float(t.double().square().sum())] for t in model.state_dict().values()]
    return hashlib.sha256(np.array(sums).tobytes()).hexdigest()[:16]


def digest_of_rows(rows: Dataset) -> str:
    """Digest of the tokens of windows."""
    return hashlib.sha256(np.array(rows["input_ids"], np.int64).tobytes()).hexdigest()[:16]


__all__ = ["BaselineModels", "digest_of", "digest_of_rows"]

"""The baselines of one base model, each trained when it is first asked for and kept in a folder."""

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

from ...model.modeling_mfn import MFNForCausalLM
from ..predictions.p5_transfer import FINE_TUNED_SAE, Transfer
from ..result import MFN, POST_HOC_SAE, RANDOM_SAE, Subjects
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
    """Post-hoc SAEs and random ones, of several seeds and trained on one domain or on all."""

    base: str | os.PathLike[str]
    rows: Callable[[str | None, int], Dataset]
    """(domain, seed) -> training windows, of all domains where it is `None`."""
    size: Mapping[str, Any]
    """`layers`, `num_features` and `k`."""
    epochs: int
    """Times that training goes through the windows."""
    folder: Path

    @cached_property
    def base_model(self) -> PreTrainedModel:
        """In float32, as SAEs are and MFN models are trained."""
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    @cached_property
    def base_digest(self) -> str:
        """Tells the base model's weights from others."""
        return digest_of(self.base_model)

    def kept(self, name: str, made_from: Mapping[str, Any], train: Callable[[], PreTrainedModel]) -> Any:
        """The model of this name in the folder, trained if there is none that was made from the same."""
        folder = self.folder / name
        record = json.dumps({"base": self.base_digest, "size": dict(self.size)} | dict(made_from), default=list)
        if not (folder / MADE_FROM).exists() or (folder / MADE_FROM).read_text(encoding="utf-8") != record:
            Console().print(f"training {name}", markup=False, highlight=False)
            beside = folder.with_name(f".{name}.part")
            shutil.rmtree(beside, ignore_errors=True)
            train().save_pretrained(beside)
            (beside / MADE_FROM).write_text(record, encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
        return AutoModelForCausalLM.from_pretrained(folder)

    def sae(self, seed: int, domain: str | None = None, base: PreTrainedModel | None = None) -> MFNForCausalLM:
        """Trained on a domain, or on all; of the base model, or of another of its size."""
        rows = self.rows(domain, seed)
        made_from = {"epochs": self.epochs, "training": training_settings(LEARNING_RATE), "text": digest_of_rows(rows)}
        return self.kept(
            f"sae-{domain or 'all'}{'-of-dense' if base is not None else ''}-seed-{seed}",
            made_from | {"of": None if base is None else digest_of(base)},
            lambda: post_hoc_sae(self.base if base is None else base, rows, epochs=self.epochs, seed=seed, **self.size),
        )

    def tuned_sae(self, seed: int, sae: MFNForCausalLM, domain: str) -> MFNForCausalLM:
        """An SAE after it went once through the windows of another domain."""
        rows = self.rows(domain, seed)
        return self.kept(
            f"sae-tuned-on-{domain}-seed-{seed}",
            {"training": training_settings(TUNING_RATE), "text": digest_of_rows(rows), "of": digest_of(sae)},
            lambda: fine_tune_sae(sae, rows, seed=seed),
        )

    def random(self, seed: int) -> MFNForCausalLM:
        """Not trained."""
        rows = self.rows(None, seed)
        return self.kept(
            f"random-seed-{seed}",
            {"calibration_windows": CALIBRATION_WINDOWS, "text": digest_of_rows(rows)},
            lambda: random_sae(self.base, rows, seed=seed, **self.size),
        )

    def subjects(self, seeds: int, domain: str | None = None) -> Subjects:
        """Of so many seeds."""
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
        """MFN models that learnt from a source, each with its dense counterpart, and for each of these an SAE that
        learnt from the same source, so that both lose against the same dense model; then these SAEs fine-tuned on each
        target. Where the dense counterpart is `None`, it is the base model."""
        saes = [self.sae(seed, source, of) for seed, of in enumerate(dense)]
        tuned = [{domain: self.tuned_sae(seed, sae, domain) for domain in targets} for seed, sae in enumerate(saes)]
        return {
            MFN: [Transfer(source, *pair) for pair in zip(models, dense, strict=True)],
            POST_HOC_SAE: [Transfer(source, sae) for sae in saes],
            FINE_TUNED_SAE: [Transfer(source, sae, tuned=own) for sae, own in zip(saes, tuned, strict=True)],
        }


def digest_of(model: PreTrainedModel) -> str:
    """Tells weights from others, by the sums of each tensor and of its squares."""
    sums = [[float(t.double().sum()), float(t.double().square().sum())] for t in model.state_dict().values()]
    return hashlib.sha256(np.array(sums).tobytes()).hexdigest()[:16]


def digest_of_rows(rows: Dataset) -> str:
    """Tells windows from others."""
    return hashlib.sha256(np.array(rows["input_ids"], np.int64).tobytes()).hexdigest()[:16]


__all__ = ["BaselineModels", "digest_of", "digest_of_rows"]

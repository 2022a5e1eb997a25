"""The baselines of one base model, each trained when it is first asked for and kept in a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..modeling_mfn import MFNForCausalLM
from .baselines import fine_tune_sae, post_hoc_sae, random_sae
from .result import MFN, POST_HOC_SAE, RANDOM_SAE, Subjects
from .transfer import FINE_TUNED_SAE, Transfer


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

    def kept(self, name: str, train: Callable[[], PreTrainedModel]) -> Any:
        """The model of this name in the folder, trained if there is none."""
        folder = self.folder / name
        if not folder.exists():
            Console().print(f"training {name}", markup=False, highlight=False)
            beside = folder.with_name(f".{name}.part")
            shutil.rmtree(beside, ignore_errors=True)
            train().save_pretrained(beside)
            beside.rename(folder)
        return AutoModelForCausalLM.from_pretrained(folder)

    def sae(self, seed: int, domain: str | None = None) -> MFNForCausalLM:
        """Trained on a domain, or on all."""

        def train() -> MFNForCausalLM:
            return post_hoc_sae(self.base, self.rows(domain, seed), epochs=self.epochs, seed=seed, **self.size)

        return self.kept(f"sae-{domain or 'all'}-seed-{seed}", train)

    def tuned_sae(self, seed: int, source: str, domain: str) -> MFNForCausalLM:
        """Trained on a source, then once through the windows of another domain."""

        def train() -> MFNForCausalLM:
            return fine_tune_sae(self.sae(seed, source), self.rows(domain, seed), seed=seed)

        return self.kept(f"sae-{source}-to-{domain}-seed-{seed}", train)

    def random(self, seed: int) -> MFNForCausalLM:
        """Not trained."""

        def make() -> MFNForCausalLM:
            return random_sae(self.base, self.rows(None, seed), seed=seed, **self.size)

        return self.kept(f"random-seed-{seed}", make)

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
        """MFN models that learnt from a source, each with its dense counterpart, and SAEs of as many seeds; those that
        are fine-tuned, on each target."""
        saes = [self.sae(seed, source) for seed in range(len(models))]
        tuned = [{domain: self.tuned_sae(seed, source, domain) for domain in targets} for seed in range(len(models))]
        return {
            MFN: [Transfer(source, *pair) for pair in zip(models, dense, strict=True)],
            POST_HOC_SAE: [Transfer(source, sae) for sae in saes],
            FINE_TUNED_SAE: [Transfer(source, sae, tuned=own) for sae, own in zip(saes, tuned, strict=True)],
        }


__all__ = ["BaselineModels"]

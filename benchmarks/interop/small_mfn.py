"""Trained small MFN models of both families, and held-out text for them, on which tools of others are tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from benchmarks.common import corpora, small_models
from modeling_mfn.demo.assets import cache_folder

RUNS = {"llama": "coding/update-k-16", "gpt2": "coding-long/pursuit-4-from-dense"}
"""Runs of `benchmarks.small.fidelity` whose models are taken. That of GPT-2 codes in four rounds."""


def folder_of(family: str) -> Path:
    """Folder of the trained model of a family.

    Raises:
        FileNotFoundError: if the run has not been made.
    """
    folder = cache_folder() / "fidelity" / family / RUNS[family]
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; benchmarks.small.fidelity makes it")
    return folder


def held_out(tokens: int) -> Dataset:
    """Windows with an equal share of each domain."""
    data = small_models.data()
    return concatenate_datasets([data.evaluation(domain, tokens // len(corpora.DOMAINS)) for domain in corpora.DOMAINS])


def quietly() -> None:
    """Keeps transformers from reporting each weight that it loads."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def versions(*packages: str) -> dict[str, Any]:
    """Versions of packages, for a record."""
    from importlib.metadata import version

    return {name: version(name) for name in packages}

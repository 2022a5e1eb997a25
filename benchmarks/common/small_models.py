"""Small base models of both families, trained from scratch on the corpora, and their data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from benchmarks.common import corpora
from modeling_mfn.demo.assets import cache_folder

VOCABULARY, HIDDEN, BLOCKS, WINDOW = 4096, 192, 4, 128
FAMILIES = ("llama", "gpt2")
EVALUATION_TOKENS = 32_768
BASE = "{}-{}-tokens-seed-{}"
"""Folder of a base model by family, tokens and seed."""
OPTIMIZER = {"weight_decay": 0.0, "adam_beta2": 0.99}
"""Optimizer settings of every training, except for the learning rate."""


class Data(NamedTuple):
    """Windows of tokens of each domain, (rows, T)."""

    train: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]

    def sample(self, tokens: int, after: int = 0, seed: int = 0, domains: Sequence[str] | None = None) -> Dataset:
        """Training windows with an equal share of each domain. Each seed has other windows.

        Args:
            tokens: number of tokens in the sample.
            after: tokens of all domains to skip.
            seed: number of the sample.
            domains: domains to sample; all by default. A domain that is used up starts again from its first window.
        """
        generator = np.random.default_rng(0)
        shares = []
        for domain, rows in self.train.items():
            order = generator.permutation(len(rows))
            if domain in (domains or self.train):
                count = tokens // rows.shape[1] // len(domains or self.train)
                first = after // rows.shape[1] // len(self.train) + seed * count
                shares.append(rows[order[np.arange(first, first + count) % len(rows)]])
        mixed = np.concatenate(shares)
        for _ in range(seed + 1):
            mixture = generator.permutation(len(mixed))
        return corpora.as_data_set(mixed[mixture])

    def evaluation(self, domain: str, tokens: int = EVALUATION_TOKENS) -> Dataset:
        """Windows spread evenly over a domain's held-out text."""
        rows = self.held_out[domain]
        return corpora.as_data_set(rows[np.linspace(0, len(rows) - 1, tokens // rows.shape[1]).astype(int)])

    def fresh(self, domain: str, tokens: int) -> Dataset:
        """Held-out windows that `evaluation` does not give by default, so that no recipe was chosen on them.

        These windows come from the same documents.
        """
        rows = self.held_out[domain]
        usual = np.linspace(0, len(rows) - 1, EVALUATION_TOKENS // rows.shape[1]).astype(int)
        left = np.setdiff1d(np.arange(len(rows)), usual)
        places = np.linspace(0, len(left) - 1, min(tokens // rows.shape[1], len(left))).astype(int)
        return corpora.as_data_set(rows[left[places]])


@cache
def data() -> Data:
    """Windows of the corpora in the small models' tokens."""
    return tokenised(corpora.tokenizer(VOCABULARY), WINDOW)


def tokenised(tokenizer: Any, window: int) -> Data:
    """Windows of the corpora in a tokenizer's tokens. Windows are made once per tokenizer and length."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]
    file = cache_folder() / f"windows-{digest}-{window}.npz"
    if not file.exists():
        arrays = {}
        for domain in corpora.DOMAINS:
            for part, documents in zip(("train", "held_out"), corpora.texts(domain), strict=True):
                arrays[f"{domain}.{part}"] = corpora.windows(documents, tokenizer, window)
        file.parent.mkdir(parents=True, exist_ok=True)
        made = file.with_name(f".{os.getpid()}.{file.name}")  # another process may write the same file
        np.savez(made, **arrays)
        os.replace(made, file)
    arrays = np.load(file)
    return Data(*({d: arrays[f"{d}.{part}"] for d in corpora.DOMAINS} for part in ("train", "held_out")))


def untrained(family: str, seed: int) -> PreTrainedModel:
    """Model with random weights and about 3 M parameters: d = 192, 4 blocks, 6 heads, tied embeddings."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(n_embd=HIDDEN, n_layer=BLOCKS, n_head=6, n_positions=256, resid_pdrop=0, embd_pdrop=0,
                       attn_pdrop=0, **common)
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=HIDDEN, intermediate_size=768, num_hidden_layers=BLOCKS, num_attention_heads=6,
                    num_key_value_heads=6, max_position_embeddings=256, tie_word_embeddings=True, **common)
    )  # fmt: skip


def trained() -> Iterator[Path]:
    """Folders of base models that exist or that `base_folder` is training."""
    return cache_folder().glob(BASE.format("*", "*", "*"))


def base_folder(family: str, seed: int, tokens: int) -> Path:
    """Folder of a base model. A missing model is trained.

    The learning rate stays constant, so that training can continue from this model.
    """
    folder = cache_folder() / BASE.format(family, tokens, seed)
    if not folder.exists():
        model = untrained(family, seed)
        settings = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 100, "learning_rate": 2e-3}
        rows = data().sample(tokens, seed=seed)
        train_dense(model, rows, folder.with_suffix(".training"), batch=16, seed=seed, **settings)
        made = folder.with_name(f".{folder.name}")
        model.save_pretrained(made)
        corpora.tokenizer(VOCABULARY).save_pretrained(made)
        made.rename(folder)
    return folder


def training_settings(rows: Dataset, batch: int, seed: int) -> dict[str, Any]:
    """Training arguments that dense and MFN models share: one pass over `rows`, `batch` rows per step."""
    steps = len(rows) // batch
    return {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        **OPTIMIZER,
        "logging_steps": max(1, steps // 20),
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": seed,
    }


def train_dense(model: PreTrainedModel, rows: Dataset, folder: Path, batch: int, seed: int, **settings: Any) -> None:
    """Trains a model without MFN layers, in place."""
    arguments = TrainingArguments(str(folder), **(training_settings(rows, batch, seed) | settings))
    Trainer(model, arguments, train_dataset=rows).train()

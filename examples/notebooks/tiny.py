"""A tiny Llama that has read part of Python's own library: a base model for the notebooks, made offline in seconds."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modeling_mfn import load_text, pack

WINDOW = 64


FILES = (
    "argparse", "ast", "configparser", "csv", "dataclasses", "datetime", "difflib", "enum", "fractions", "functools",
    "inspect", "mailbox", "pickle", "random", "shutil", "smtplib", "statistics", "string", "subprocess", "tarfile",
    "textwrap", "threading", "tokenize", "turtle", "typing", "uuid", "zipfile",
)  # fmt: skip


def library() -> list[Path]:
    """Files of Python's library, from a fixed list. Files that this Python lacks are left out."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{name}.py" for name in FILES]
    return [file for file in files if file.is_file()]


def tokenizer_of(files: list[Path], vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the files."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train([str(file) for file in files], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")


def tiny_base(steps: int = 250, seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, Dataset, Dataset]:
    """Trains a Llama of 320,000 parameters.

    Returns:
        The model, its tokenizer, training windows, and 64 held-out windows. A window has 64 tokens.
    """
    files = library()
    tokenizer = tokenizer_of(files)
    windows = pack(load_text(files), tokenizer, WINDOW).shuffle(seed=seed)
    held_out, training = windows.take(64), windows.skip(64)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=WINDOW, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    rows = torch.tensor(training["input_ids"])
    for batch in rows[: 16 * steps].split(16):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer, training, held_out

"""Windows of tokens for tests of the atlas, a tokenizer that names tokens, and hostile text."""

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

WINDOW = 16
HOSTILE = [
    "<script>alert(1)</script>",
    "[red]markup[/red] :warning:",
    "\x1b[2J\x1b]0;title\x07\r\x00",
    "\u202eright to left\u2066",
    "| a | `b` *c* [d](javascript:e) |\n# f",
    "z\u0335\u0321" + "\u0335" * 500,
    "x" * 10_000_000,
]


def word_tokenizer(words=()):
    """Tokenizer whose token i is `w<i>`; the last tokens are the given words."""
    names = [f"w{i}" for i in range(96 - len(words))] + list(words)
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w0", unk_token="w0")


def windows(rows=13, padded=True, sources=("beta", "alpha"), seed=0):
    """Random windows from several sources, some padded on the left and some on the right."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(3, 96, (rows, WINDOW))
    mask = np.ones((rows, WINDOW), int)
    if padded:
        mask[1::4, :5] = 0
        mask[2::4, 9:] = 0
    columns = {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}
    return Dataset.from_dict(columns | {"source": [sources[row % len(sources)] for row in range(rows)]})

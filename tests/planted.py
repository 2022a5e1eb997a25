"""A tiny model whose features fire on words by design.

Each feature reads one axis of the embeddings, and attention is off.
"""

import numpy as np
import torch
from conftest import HIDDEN, VOCABULARY, make_base, make_mfn
from datasets import Dataset
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

ANIMALS = ["dog", "cat", "cow", "horse", "lion", "tiger", "wolf", "bear", "fox", "goat", "sheep", "mouse"]
FOODS = ["bread", "milk", "rice", "soup", "cake", "meat", "fish", "salt", "corn", "bean", "pie", "tea"]
CONCEPTS = {"animals": ANIMALS, "foods": FOODS}
WORDS = ANIMALS + FOODS + ["king", "queen", "prince"]
FIRST = VOCABULARY - len(WORDS)
"""Token of the first word; earlier tokens are `w<i>`."""
ANIMAL, MEMORY, ANY_WORD, KINGS, RANDOM = 0, 1, 2, 3, 8
"""Features: one each for animals, for four animals only, for all words and for kings; noise from `RANDOM` on."""


def token_of(word):
    return FIRST + WORDS.index(word)


def tokenizer():
    names = [f"\u2581{word}" for word in [f"w{i}" for i in range(FIRST)] + WORDS]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="\u2581w0"))
    words.pre_tokenizer, words.decoder = Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="\u2581w2", pad_token="\u2581w0", unk_token="\u2581w0"
    )


def model(remembered=ANIMALS[:4], seed=0):
    """Makes a model whose layer 0 has one feature per axis of the embeddings.

    Feature i has the value of axis i of a token's embedding, 0 or a power of 2.
    """
    base = make_base("llama-tied")
    generator = np.random.default_rng(seed)
    table = np.zeros((VOCABULARY, HIDDEN))
    table[:, RANDOM:] = generator.choice([0, 0, 0, 0.25, 0.5, 1, 2], (VOCABULARY, HIDDEN - RANDOM))
    animals, foods = ([token_of(word) for word in words] for words in (ANIMALS, FOODS))
    table[animals, ANIMAL] = generator.choice([8, 16, 32], len(animals))
    table[foods[:3], ANIMAL] = 4  # weaker than on any animal
    table[[token_of(word) for word in remembered], MEMORY] = 8
    table[animals + foods, ANY_WORD] = 8
    table[[token_of(word) for word in ("king", "queen", "prince")], KINGS] = 8
    mfn = make_mfn(base, layers=[0], num_features=HIDDEN, k=HIDDEN, input_norm="none")
    with torch.no_grad():
        mfn.get_input_embeddings().weight.copy_(torch.tensor(table))
        mfn.model.backbone.layers[0].self_attn.o_proj.weight.zero_()
        layer = mfn.mfn_layers[0]
        layer.encoder.weight.copy_(torch.eye(HIDDEN))
        layer.encoder.bias.zero_()
    return mfn


def text(rows=96, length=16, seed=1):
    """Random windows in which all tokens are equally likely."""
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, (rows, length))
    return Dataset.from_dict({"input_ids": ids.tolist()})

"""A tiny model with an atlas, presets and a tokenizer of bytes, and the explorer's app around it."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from conftest import VOCABULARY, make_base, make_mfn
from datasets import Dataset
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from modeling_mfn import Ablate, Clamp, FeatureAtlas

PRUNED = 6
"""Feature of layer 0 that is pruned."""
ACTIVE, OTHER = "loud", "quiet"
"""Presets of the model. The first one is active by default."""
LATIN = b" abcdefghijklmnopqrstuvwxyz,.\n0123456789"


def _symbol(byte):
    """Character that stands for a byte in the vocabulary of a byte-level tokenizer."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [other for other in range(256) if other not in shown]
    return chr(byte) if byte in shown else chr(256 + hidden.index(byte))


def byte_tokenizer():
    """Tokenizer with one token per byte: letters, and bytes of characters that need two to four of them."""
    beginnings = [0xC3, 0xE2, 0xF0, 0xCE]
    others = [*range(0x80, 0x80 + VOCABULARY - 3 - len(LATIN) - len(beginnings))]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {_symbol(byte): 3 + place for place, byte in enumerate([*LATIN, *beginnings, *others])}
    assert len(vocabulary) == VOCABULARY
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>")


@functools.cache
def made():
    """Model, tokenizer and atlas. Tests leave them as they are."""
    model, tokenizer = make_mfn(make_base("llama-tied", max_position_embeddings=128)), byte_tokenizer()
    model.generation_config.eos_token_id = None
    model.prune_features(0, [PRUNED])
    model.save_preset(ACTIVE, {"L0/3": Clamp(30.0), "L2/9": Clamp(30.0)})
    model.save_preset(OTHER, {"L1/5": Clamp(20.0), "L0/1": Ablate()}, positions="generated")
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (24, 16))
    atlas = FeatureAtlas.build(model, tokenizer, Dataset.from_dict({"input_ids": ids.tolist()}), progress=False)
    model.config.active_preset = ACTIVE
    return model, tokenizer, atlas


def save(folder):
    """Saves the model with tokenizer and atlas."""
    for part in made():
        part.save_pretrained(folder)


@functools.cache
def site():
    """Folder with a page, and a secret next to it."""
    place = Path(tempfile.mkdtemp())
    (place / "site" / "data").mkdir(parents=True)
    (place / "site" / "index.html").write_text("<!doctype html><title>page</title>")
    (place / "site" / "data" / "site.js").write_text("MFN.receive('site', {});")
    (place / "secret.txt").write_text("secret")
    (place / "site" / "link.txt").symlink_to(place / "secret.txt")
    return place / "site"


@torch.no_grad()
def generated(interventions, positions="all", prompt="we go", new=12, **settings):
    """Token ids that `model.generate` adds to a prompt, in a call of its own."""
    from modeling_mfn.model.modes import unsteered

    model, tokenizer, _ = made()
    seed = settings.pop("seed", None)
    if seed is not None:
        torch.manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with unsteered(model), model.steer(interventions, positions):
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            pad_token_id=0,
            do_sample=bool(settings),
            **settings,
        )
    return found[0, ids.shape[1] :].tolist()

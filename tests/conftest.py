"""Tiny random base models of every family, and MFN models made from them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# MKL's fastest products round differently for different memory alignments, so that equal runs would differ
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import gc
import logging
from collections import Counter

import pytest
import torch
from open_pages import chromium, hostile_site, open_page, site  # noqa: F401 - fixtures
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from modeling_mfn import MFNForCausalLM

VOCABULARY, HIDDEN, BLOCKS = 96, 32, 3
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = COMMON | {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = COMMON | {"n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64}
BASES = {
    "llama-tied": (LlamaForCausalLM, LlamaConfig, LLAMA | {"tie_word_embeddings": True}),
    "llama-untied": (LlamaForCausalLM, LlamaConfig, LLAMA | {"tie_word_embeddings": False}),
    "gpt2-tied": (GPT2LMHeadModel, GPT2Config, GPT2 | {"tie_word_embeddings": True}),
    "gpt2-untied": (GPT2LMHeadModel, GPT2Config, GPT2 | {"tie_word_embeddings": False}),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Makes half of the cases of each test that is marked `halved` slow: of each pair one, of four the middle ones.

    So each value of both parameters stays in the short run, where one of them is the family.
    """
    seen = Counter()
    for item in items:
        if item.get_closest_marker("halved"):
            test = item.location[0], item.originalname
            if seen[test].bit_count() % 2:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


def pytest_collection_finish():
    """Keeps what the test files imported out of garbage collections: Trainer makes one before each training."""
    gc.collect()
    gc.freeze()


def make_base(name, **settings):
    """Makes a random base model. Its weights are large, so that logits differ clearly from token to token."""
    model_class, config_class, arguments = BASES[name]
    torch.manual_seed(7)
    return model_class(config_class(**(arguments | {"initializer_range": 0.2} | settings))).eval()


def make_mfn(base, seed=11, **settings):
    """Makes an MFN model, calibrated on random tokens. Noise moves its encoders from their start as a training does."""
    torch.manual_seed(seed)
    settings = {"num_features": 80, "k": 8, "alpha": 1.0, "codes": "stream", "calibration": tokens(4, 16)} | settings
    model = MFNForCausalLM.from_base(base, **settings)
    with torch.no_grad():
        for layer in model.mfn_layers.values():
            length = layer.encoder.weight.norm(dim=-1).mean()
            layer.encoder.weight += 0.2 * length * torch.randn_like(layer.encoder.weight)
            layer.encoder.bias += 0.1 * torch.randn_like(layer.encoder.bias)
    return model


def tokens(rows, length, seed=3):
    return {"input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))}


def stream_before(layer, arguments):
    """Returns the stream (B, T, d) that a hooked MFN layer takes out before it codes: 0 with `codes="stream"`."""
    h, mfn_pass = arguments
    before = mfn_pass.stream_before(layer.layer_index)
    return torch.zeros_like(h) if before is None else before


def enable_checkpointing(model, kwargs=None):
    # transformers 6 removes the older name, and early releases of 5 have only that one
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs)


PIPELINES_OWN = "Passing `generation_config` together with generation-related arguments"
"""Deprecation that transformers' pipelines cause themselves."""


class Deprecations(logging.Handler):
    """Deprecations that transformers logs. Those that Python warns of are errors by pyproject.toml."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        if "deprecated" in record.getMessage() and not record.getMessage().startswith(PIPELINES_OWN):
            self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def nothing_deprecated():
    """Fails a test that uses what transformers will remove. It logs each deprecation once per process."""
    heard = Deprecations()
    logging.getLogger("transformers").addHandler(heard)
    yield
    logging.getLogger("transformers").removeHandler(heard)
    assert not heard.messages


@pytest.fixture(params=BASES)
def base(request):
    return make_base(request.param)


@pytest.fixture(params=["llama-tied", "gpt2-tied"])
def family_base(request):
    """One base model per family, for tests in which tied weights do not matter."""
    return make_base(request.param)

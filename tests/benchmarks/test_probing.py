"""Inputs of sae-probes are what an MFN layer codes on the last token of each text."""

import pytest
import torch
from conftest import make_base, make_mfn
from tokenizers_for_tests import make_tokenizer

from benchmarks.interop.probing import last_token_activations
from modeling_mfn.model.modes import as_base


@pytest.mark.parametrize("codes", ["stream", "update"])
def test_activations_of_the_last_token(codes):
    tokenizer = make_tokenizer()
    model = make_mfn(make_base("gpt2-tied", vocab_size=max(len(tokenizer), 96)), codes=codes)
    texts = ["a line", "another line, longer than that", "one"]
    found = last_token_activations(model, tokenizer, texts, 1)
    for row, text in zip(found, texts, strict=True):
        with torch.no_grad(), as_base(model):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            expected = model(input_ids=ids, output_reconstructions=True).reconstructions[1].residual[0, -1]
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)
    assert not model.mfn_layers[1].hook_in._forward_hooks

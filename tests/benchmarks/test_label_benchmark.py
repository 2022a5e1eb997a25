"""`benchmarks/smollm2/labels.py` on the planted model, whose animal feature makes animals likelier by design."""

import re

import planted
import pytest
import torch

from benchmarks.smollm2 import labels
from modeling_mfn import Clamp
from modeling_mfn.features.labelling.concepts import Lexicon


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Record of a small study, the model, the folder of the atlas and the settings of sampling."""
    model = planted.model()
    with torch.no_grad():
        layer = model.mfn_layers[0]
        layer.decoder.weight.copy_(torch.eye(len(layer.decoder.weight)))
        layer.decoder.bias.zero_()
        for block in model.model.backbone.layers:  # the LM head then reads the features' output directly
            block.mlp.down_proj.weight.zero_()
            block.self_attn.o_proj.weight.zero_()
    how = labels.Sampling(("w5", "w9 w17"), samples=12, new_tokens=10, seed=0)
    folder = tmp_path_factory.mktemp("labels")
    tokenizer, limits = planted.tokenizer(), {"min_occurrences": 20, "min_words": 3}
    labelling = labels.label_atlas(model, tokenizer, planted.text(96), planted.CONCEPTS, how.seed, folder, **limits)
    record = {"labelling": labelling} | labels.table_and_steering(
        model, tokenizer, planted.text(8, seed=9), planted.CONCEPTS, how, strength=2.0, shown=10, steering=5,
        folder=folder,
    )  # fmt: skip
    return record, model, folder, how


def test_the_table_has_the_planted_feature_and_its_figures(found):
    (row,) = found[0]["features"]
    assert (row["feature"], row["concept"], row["score"], row["recall"]) == ("L0/0", "animals", 1.0, 1.0)
    assert found[0]["labelling"]["with_shuffled_words"] == 0
    assert all(re.search(rf"\[ ({'|'.join(planted.ANIMALS)})\]", example) for example in row["examples"])


def test_steering_makes_the_concepts_words_likelier_and_another_feature_does_not(found):
    (run,) = found[0]["steering"]
    rates = {name: run[name]["words_per_1000"] for name in ("none", "steered", "random")}
    assert rates["steered"] > 3 * max(rates["none"], rates["random"])
    for name in rates:
        parts = run[name]["held_in_words_per_1000"] + run[name]["held_out_words_per_1000"]
        assert parts == pytest.approx(rates[name], abs=2e-3)
    assert run["steered"]["held_out_words_per_1000"] > 3 * run["none"]["held_out_words_per_1000"]
    assert run["steered"]["held_out_perplexity"] > run["none"]["held_out_perplexity"]
    assert run["random_feature"] != "L0/0"


def test_the_count_is_that_of_words_in_the_text(found):
    """Samples the steered continuations again, decodes them and counts words.

    Perplexity is compared with the base model's own loss.
    """
    record, model, folder, how = found
    (run,) = record["steering"]
    tokenizer, atlas = planted.tokenizer(), labels.FeatureAtlas.from_pretrained(folder)
    lexicon = Lexicon.of(planted.CONCEPTS, how.seed)
    out = {word for word, half in zip(lexicon.words, lexicon.half, strict=True) if half == 1}
    words = total = held_out = 0
    losses = []
    with model.steer(atlas.steering({"L0/0": Clamp(2.0)})):
        texts = list(labels.continuations(model, tokenizer, how))
    model.set_blend(0.0)
    for text, length in texts:
        for row in text:
            written = tokenizer.decode(row[length:]).split()
            words += sum(word in planted.ANIMALS for word in written)
            held_out += sum(word in out and word in planted.ANIMALS for word in written)
            total += len(written)
            targets = row.clone()
            targets[:length] = -100
            losses.append(model(row[None], labels=targets[None]).loss.item())
    model.set_blend(1.0)
    assert total == run["steered"]["tokens"] == 240
    assert run["steered"]["words_per_1000"] == pytest.approx(words / total * 1000, abs=1e-2)
    assert run["steered"]["held_out_words_per_1000"] == pytest.approx(held_out / total * 1000, abs=1e-2)
    expected = torch.tensor(losses).double().mean().exp().item()
    assert run["steered"]["perplexity_to_base"] == pytest.approx(expected, rel=1e-3)

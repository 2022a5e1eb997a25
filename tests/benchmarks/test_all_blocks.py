"""Stages of `benchmarks/smollm2/all_blocks.py` on a tiny base, and their figures against independent ones."""

import itertools
import json
import math

import pytest
import torch
from conftest import make_base
from datasets import Dataset
from test_real_checkpoint import K, M, T, losses_of, tiny_study, train_nothing
from tokenizers_for_tests import make_tokenizer
from transformers import AutoModelForCausalLM

from benchmarks.smollm2 import all_blocks, sparsify_baseline
from modeling_mfn import FeatureAtlas, MFNForCausalLM
from modeling_mfn.evaluation.measures.perplexity import perplexity


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Study after all of its stages."""
    made = tiny_study(tmp_path_factory.mktemp("study"), layers=(0, 1, 2))
    make_tokenizer().save_pretrained(made.base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsify_baseline, "train", train_nothing)  # sparsify is not in the development environment
        all_blocks.run_stages(made)
    return made


@pytest.mark.slow
def test_losses_are_those_of_the_saved_models_and_lost_nats_their_differences(study):
    held_out, found = study.windows["held_out"], {name: study.result(f"evaluate/{name}") for name in all_blocks.METHODS}
    for name in ("base", "dense"):
        model = AutoModelForCausalLM.from_pretrained(study.folder / name)
        assert found[name]["loss"] == pytest.approx(losses_of(model, held_out), abs=1e-3)
    for name in ("cached", "joint", "joint-in-4-rounds", *all_blocks.SPLICED):
        model = MFNForCausalLM.from_pretrained(study.folder / name.removesuffix("-in-4-rounds"))
        model.config.coding_rounds = {"joint": 2, "joint-in-4-rounds": 4}.get(name, 1)
        assert (model.config.codes, model.config.layers) == (all_blocks.SPLICED.get(name, "update"), [0, 1, 2])
        model.set_blend(1.0)
        assert found[name]["loss"] == pytest.approx(losses_of(model, held_out), abs=1e-3)
        rounded = found.get(f"{name}-in-bfloat16", found[name])["loss"]
        assert rounded["mean"] == pytest.approx(found[name]["loss"]["mean"], abs=0.05)
        assert (rounded != found[name]["loss"]) == (name in all_blocks.IN_BFLOAT16.values())
        for control in ("base", "dense"):
            for domain, lost in found[name][f"lost_to_{control}"].items():
                expected = found[name]["loss"][domain] - found[control]["loss"][domain]
                assert lost == pytest.approx(expected, abs=2e-4)


def test_means_against_a_plain_base_whose_blocks_give_out_constants(study):
    """Replaces the stream after each attention by its mean, or what was written since the last such place."""
    base = make_base("llama-tied")
    blocks, found = base.model.layers, {}

    def reading(place):
        return blocks[place].post_attention_layernorm.register_forward_pre_hook(
            lambda module, arguments: found.update({place: arguments[0]})
        )

    handles = [reading(place) for place in range(3)]
    with torch.no_grad():
        rows = study.windows["train"]
        base(rows)
        streams = [base.model.embed_tokens(rows), *(found[place] for place in range(3))]
    for handle in handles:
        handle.remove()
    for codes, means in (
        ("stream", [h.mean((0, 1)) for h in streams[1:]]),
        ("update", [(h - before).mean((0, 1)) for before, h in itertools.pairwise(streams)]),
    ):

        @torch.no_grad()
        def loss(means=means, codes=codes):
            ids = study.windows["held_out"]
            s = h = base.model.embed_tokens(ids)
            for block, mean in zip(blocks, means, strict=True):
                s = (s if codes == "update" else 0) + mean.expand_as(h)
                h = s + block.mlp(block.post_attention_layernorm(s))
            logits = base.lm_head(base.model.norm(h))[:, :-1]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()

        assert study.result(f"evaluate/mean-{codes}")["loss"]["mean"] == pytest.approx(loss(), abs=2e-3)


def test_joint_training_moves_the_whole_model_and_its_curve_ends_at_the_saved_one(study):
    cached, joint = (MFNForCausalLM.from_pretrained(study.folder / name) for name in ("cached", "joint"))
    base = MFNForCausalLM.from_base(make_base("llama-tied"), num_features=M, k=K).state_dict()
    kept = {name for name, value in joint.state_dict().items() if torch.equal(value, cached.state_dict()[name])}
    assert not kept
    assert all(torch.equal(value, base[name]) for name, value in cached.state_dict().items() if ".mfn." not in name)
    joint.set_blend(1.0)
    validation = Dataset.from_dict({"input_ids": study.windows["validation"].tolist()})
    dense = AutoModelForCausalLM.from_pretrained(study.folder / "dense")
    for model, name, windows in ((joint, "joint", 12), (dense, "dense", 20)):  # two thirds, in whole batches
        curve = study.result(name)["curve"]
        assert (curve[0]["tokens"], curve[-1]["tokens"]) == (0, windows * T)
        with torch.autocast("cpu", torch.bfloat16):
            assert curve[-1]["loss"] == pytest.approx(math.log(perplexity(model, validation)), abs=1e-3)
    layers = study.result("evaluate/joint")["layers"]
    assert list(layers) == ["layer_0", "layer_1", "layer_2"]
    assert all(of["active_features"] <= K for of in layers.values())


def test_an_interrupted_training_goes_on_from_its_checkpoint(study):
    (checkpoint,) = (study.folder / "joint.training").glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    again = all_blocks.joint(study)  # nothing is left to do
    assert again["curve"] == study.result("joint")["curve"]


def test_the_atlas_next_to_the_weights_counts_the_firings_of_the_cached_text(study):
    made, record = FeatureAtlas.from_pretrained(study.folder / "joint"), study.result("atlas")
    model = MFNForCausalLM.from_pretrained(study.folder / "joint")
    with torch.no_grad():
        codes = model(study.windows["train"], output_codes=True).codes
    firings = {
        layer: torch.bincount(code.indices[:, 1:][code.values[:, 1:] > 0], minlength=M) for layer, code in codes.items()
    }
    table = made.to_pandas().reset_index()
    for layer, expected in firings.items():
        found = table[table["layer"] == layer].sort_values("index")["firing_count"]
        assert found.tolist() == expected.tolist()
    assert record["silent_features"] == sum(int((of == 0).sum()) for of in firings.values())
    assert record["features"] == 3 * M

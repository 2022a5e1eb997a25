"""Pruned, removed, reset and merged features, compared with steered models and dense float64 equations."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import make_base, make_mfn, tokens
from fresh_process import run_without_the_plugin
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from test_saving import SCRIPT
from trainings import arguments, rows, train
from transformers import AutoModelForCausalLM

from modeling_mfn import Ablate, Clamp, MFNConfig, MFNForCausalLM, MFNTrainer
from modeling_mfn.model.feature_editing import find_duplicates
from modeling_mfn.model.mfn_pass import ReconstructionRequest
from modeling_mfn.model.pursuit import pursue
from modeling_mfn.model.sparse_code import encode
from modeling_mfn.training.feature_sums import FeatureSums

PRUNED = {0: [3, 5, 9, 11, 40, 41, 79], 2: [0, 1, 2, 3, 60]}
REQUEST = ReconstructionRequest(candidates=16, revive={0: torch.tensor([4, 50, 78])}, revive_k=2)


def prune(model, pruned=PRUNED):
    for layer, features in pruned.items():
        model.prune_features(layer, features)
    return model


def steered(model, pruned=PRUNED):
    return model.steer({(layer, feature): Ablate() for layer, features in pruned.items() for feature in features})


def ablated(model, batch, pruned=PRUNED, **kwargs):
    with steered(model, pruned):
        return model(**batch, **kwargs)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.fixture(params=[("llama-tied", "stream"), ("gpt2-tied", "update")], ids=" ".join)
def model(request):
    base, codes = request.param
    return make_mfn(make_base(base).double(), layers=[0, 2], codes=codes)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_pruned_features_are_ablated_ones_and_their_weights_can_go(model, alpha):
    batch = tokens(4, 16)
    model.set_blend(alpha)
    plain = model(**batch, output_codes=True)
    expected = ablated(model, batch, output_codes=True)
    assert all(plain.codes[layer].to_dense()[..., features].any() for layer, features in PRUNED.items())
    assert not torch.allclose(plain.logits, expected.logits)
    with steered(model):
        written = model.generate(**tokens(2, 5), max_new_tokens=4, do_sample=False)
    prune(model, {layer: features[:4] for layer, features in PRUNED.items()})
    prune(model)  # includes features that are pruned already
    size = {name: len(parameter) for name, parameter in model.named_parameters() if ".mfn." in name}
    for edit in (lambda: None, model.compact, model.compact):
        edit()
        found = model(**batch, output_codes=True)
        close(found.logits, expected.logits)
        for layer in PRUNED:
            code = found.codes[layer]
            assert code.num_features == 80
            assert code.indices.shape == plain.codes[layer].indices.shape
            close(code.to_dense(), expected.codes[layer].to_dense())
        assert torch.equal(model.generate(**tokens(2, 5), max_new_tokens=4, do_sample=False), written)
    assert model.config.pruned_features == {"0": PRUNED[0], "2": PRUNED[2]}
    for name, parameter in model.named_parameters():
        if ".mfn." in name:
            gone = len(PRUNED[0 if ".0.mfn" in name else 2]) if name.endswith("decoder.weight") else 0
            assert len(parameter) == size[name] - gone


@pytest.mark.parametrize(("rounds", "steps"), [(1, 2), (4, 1)])
def test_codes_are_completed_without_pruned_features(family_base, rounds, steps):
    pursuit = {"coding_rounds": rounds, "refine_steps": steps}
    model = make_mfn(family_base.double(), layers=[0, 2], codes="update", **pursuit)
    layer, u = model.mfn_layers[2], torch.randn(40, model.config.hidden_size, dtype=torch.float64)
    x = layer.standardise(u).x
    code = encode(x, layer.encoder.weight, layer.encoder.bias, model.config.k // rounds)
    pruned = code.indices[0, :2]
    kept = code._replace(values=code.values.masked_fill(torch.isin(code.indices, pruned), 0))
    directions = layer.decoder.weight.detach().clone()
    directions[pruned] = 0
    expected = pursue(kept, x - layer.decoder.bias, directions, rounds, model.config.k // rounds, steps)
    assert not torch.equal(layer.encode(u).to_dense(), expected.to_dense())
    model.prune_features(2, pruned.tolist())
    for _ in range(2):
        torch.testing.assert_close(layer.encode(u).to_dense(), expected.to_dense(), atol=1e-12, rtol=0)
        model.compact()


def test_without_competition_others_take_the_places(model):
    """Compares the layer with dense equations without the pruned features.

    Tokens on which no pruned feature was chosen stay unchanged.
    """
    batch = tokens(4, 16)
    h = model(**batch, output_reconstructions=True).reconstructions[0].residual
    layer, kept = model.mfn_layers[0], [f for f in range(80) if f not in PRUNED[0]]
    before, chosen = layer(h), layer.encode(h)
    untouched = ~torch.isin(chosen.indices, torch.tensor(PRUNED[0])).any(-1)
    mean, std = h.mean(-1, keepdim=True), h.std(-1, keepdim=True)
    z = torch.relu((h - mean) / (std + 1e-5) @ layer.encoder.weight[kept].T + layer.encoder.bias[kept])
    z = torch.where(z >= z.topk(8, dim=-1).values[..., -1:], z, 0)
    expected = std * (z @ layer.decoder.weight[kept] + layer.decoder.bias) + mean
    prune(model).compact(keep_competition=False)
    close(layer(h), expected)
    close(layer(h)[untouched], before[untouched])
    assert untouched.any()
    assert not torch.allclose(layer(h)[~untouched], before[~untouched])
    code = layer.encode(h)
    close(code.to_dense()[..., kept], z)
    assert not code.to_dense()[..., PRUNED[0]].any()
    assert layer.encoder.weight.shape == (73, 32)
    with pytest.raises(ValueError, match=r"k is 74; .* num_features \(80\), less 7 that compact\(\) removed"):
        model.set_k(74)
    model.set_k(73)
    assert torch.isfinite(model(**batch).logits).all()


def test_features_pruned_after_a_removal(model):
    batch = tokens(4, 16)
    first, second = {0: [3, 9]}, {0: [4, 79]}
    model = prune(model, first)
    model.compact(keep_competition=False)
    expected = ablated(model, batch, second).logits
    prune(model, second)
    close(model(**batch).logits, expected)
    model.compact()
    close(model(**batch).logits, expected)
    layer = model.mfn_layers[0]
    assert (len(layer.encoder.weight), len(layer.decoder.weight)) == (78, 76)
    assert model.config.removed_encoder_rows == {"0": [3, 9]}
    assert model.config.removed_decoder_rows == {"0": [3, 4, 9, 79]}


@pytest.mark.parametrize("keep", [True, False])
def test_a_compacted_model_has_the_gradients_and_losses_of_the_pruned_one(model, keep):
    """Compares loss inputs, steered logits and gradients before and after `compact`.

    Loss inputs are the code, the candidates and the revived features.
    """
    batch = tokens(4, 16)
    prune(model)
    if not keep:  # no pruned feature is chosen, so that removal of its encoder row changes nothing
        for layer, features in PRUNED.items():
            model.mfn_layers[layer].encoder.bias.data[features] = -100

    def results():
        model.zero_grad()
        out = model(**batch, reconstruction_request=REQUEST)
        item = out.reconstructions[0]
        with model.steer({(0, 78): Clamp(3.0), (2, 59): Clamp(2.0)}):
            clamped = model(**batch).logits
        loss = out.logits.square().mean() + item.revived.square().mean() + item.code.values.square().mean()
        loss = loss + item.candidates.values.square().mean() + clamped.square().mean()
        loss.backward()
        found = {"loss": loss.detach(), "clamped": clamped.detach(), "revived": item.revived.detach()}
        for layer, mfn in model.mfn_layers.items():
            there = torch.tensor([f for f in range(80) if f not in PRUNED[layer]])
            for name, (parameter, at) in zip(("weight", "bias", "rows"), mfn.rows_of(there), strict=True):
                found[f"{layer}/{name}"] = parameter.grad[at].clone()
        return found

    expected = results()
    if keep:
        for layer, features in PRUNED.items():  # pruned features get no gradient
            for parameter, at in model.mfn_layers[layer].rows_of(torch.tensor(features)):
                assert not parameter.grad[at].any()
    model.compact(keep_competition=keep)
    for name, value in results().items():
        close(value, expected[name])


@pytest.mark.parametrize("keep", [True, False])
def test_saved_compacted_models(family_base, tmp_path, keep):
    """Loads compacted models with Auto classes, with device maps and in bfloat16, and resizes their vocabulary.

    The weights file is smaller by the removed rows.
    """
    model = make_mfn(family_base, layers=[0, 2])
    model.save_pretrained(tmp_path / "whole")
    batch, folder = tokens(2, 9), tmp_path / "model"
    prune(model).save_pretrained(tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert not loaded.mfn_layers[0].decoder.weight[PRUNED[0]].any()
    model.compact(keep_competition=keep)
    logits = model(**batch, output_codes=True)
    model.save_pretrained(folder)
    gone = 4 * 12 * (32 if keep else 32 + 32 + 1)
    sizes = [(place / "model.safetensors").stat().st_size for place in (tmp_path / "whole", folder)]
    assert sizes[0] - sizes[1] == pytest.approx(gone, abs=64)
    assert json.loads((folder / "config.json").read_text())["pruned_features"] == {"0": PRUNED[0], "2": PRUNED[2]}
    for kwargs in ({}, {"device_map": "auto"}, {"device_map": {"": "cpu"}, "low_cpu_mem_usage": True}):
        loaded = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
        found = loaded(**batch, output_codes=True)
        assert torch.equal(found.logits, logits.logits)
        assert torch.equal(found.codes[2].indices, logits.codes[2].indices)
    with torch.device("meta"):
        empty = MFNForCausalLM(model.config)
    assert [p.shape for p in empty.parameters()] == [p.shape for p in model.parameters()]
    low, pruned = (MFNForCausalLM.from_pretrained(tmp_path / name, dtype="bfloat16") for name in ("model", "pruned"))
    assert low.mfn_layers[0].decoder.weight.dtype == torch.bfloat16
    assert torch.equal(low(**batch).logits, pruned(**batch).logits) == keep
    loaded.resize_token_embeddings(100)
    torch.testing.assert_close(loaded(**batch).logits[..., :96], logits.logits, atol=1e-5, rtol=0)


def test_a_fresh_process_without_the_plugin_loads_a_compacted_model(tmp_path):
    model, batch, folder = make_mfn(make_base("gpt2-tied"), layers=[0, 2]), tokens(2, 9), tmp_path / "model"
    prune(model, {0: [3, 9], 2: [5]}).compact(keep_competition=False)
    prune(model).compact()
    model.save_pretrained(folder)
    save_file({"input_ids": batch["input_ids"], "logits": model(**batch).logits.detach()}, tmp_path / "expected")
    run_without_the_plugin(SCRIPT, tmp_path, folder, tmp_path / "expected")


def test_a_fresh_model_of_an_edited_config_starts_as_others_do(model):
    prune(model, {0: [3, 9]})
    model.compact(keep_competition=False)
    prune(model, {0: [4]})
    model.compact()
    layer = MFNForCausalLM(model.config).mfn_layers[0]
    there = torch.tensor([f for f in range(80) if f not in (3, 4, 9)])
    (weight, read), (bias, _), (written, to) = layer.rows_of(there)
    torch.testing.assert_close(written.norm(dim=-1), torch.ones(77))
    assert torch.equal(weight[read], written[to])
    assert not bias.any()


def test_an_unedited_model_has_no_tables_and_a_compiled_edited_one_is_the_same():
    model, batch = make_mfn(make_base("llama-tied").double(), layers=[0, 2]), tokens(2, 6)
    assert all(layer.rows is None for layer in model.mfn_layers.values())
    assert (model.config.pruned_features, model.config.removed_decoder_rows) == ({}, {})
    prune(model).compact(keep_competition=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        close(compiled(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("edit", ["prune", "compact", "compact entirely"])
def test_training_leaves_pruned_features_alone(tmp_path, edit):
    """Trains with all losses, restarts of dead features, weight decay and normalised directions."""
    model = make_mfn(make_base("llama-tied"), layers=[0, 2], alpha=0.0)
    prune(model)
    if edit != "prune":
        model.compact(keep_competition=edit == "compact")
    lambdas = {f"lambda_{name}": 0.1 for name in ("rate", "comp", "stab", "aux")}
    settings = lambdas | {"rate_window": 20, "reinit_dead_every": 2, "weight_decay": 0.1, "alpha_anneal": 2}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = train(tmp_path, model, max_steps=6, rate_floor=1.0, rho=0.2, **settings)
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(torch.isfinite(torch.tensor(value)) for entry in losses for value in entry.values())
    for layer, features in PRUNED.items():
        mfn = model.mfn_layers[layer]
        kept = torch.tensor([f for f in range(80) if f not in features])
        (weight, _), _, (written, to) = mfn.rows_of(kept)
        torch.testing.assert_close(written[to].norm(dim=-1), torch.ones(len(kept)), atol=1e-6, rtol=0)
        assert (trainer.statistics.rates[trainer.statistics.layers.index(layer), features] == 0).all()
        if edit == "prune":
            assert not written[features].any()
        if edit != "compact entirely":  # only weight decay changes these encoder rows
            name = next(n for n, p in model.named_parameters() if p is weight)
            shares = weight[features] / before[name][features]
            assert ((shares <= 1) & (shares > 0.99)).all()
    code = model(**tokens(4, 16), output_codes=True).codes[0].to_dense()
    assert not code[..., PRUNED[0]].any()
    assert 0 not in trainer.statistics.below(0.0)


def test_the_figures_of_training_are_about_features_that_are_not_pruned(tmp_path):
    model = make_mfn(make_base("gpt2-tied"), layers=[0], alpha=0.0)
    with torch.no_grad():
        model.mfn_layers[0].encoder.bias[[3, 4, 5]] = -100
    mask = torch.ones(2, 9)
    for pruned, dead in (([], [3, 4, 5, 6]), ([3, 4, 7], [5, 6])):
        model.prune_features(0, pruned)
        trainer = MFNTrainer(model, arguments(tmp_path), train_dataset=rows(4))
        statistics, logs = trainer.statistics, {"loss": 0.0}
        found = model(**tokens(2, 9), output_reconstructions=True).reconstructions
        trainer._in_training.count(FeatureSums.of(model.mfn_layers, found, mask))
        statistics.silent_for[0, [3, 4, 5, 6]] = 1e9
        trainer.log(logs)
        assert logs["dead_share"] == pytest.approx(len(dead) / (80 - len(pruned)))
        assert statistics.dead([0]).tolist() == dead
    statistics.add(FeatureSums.of(model.mfn_layers, found, mask))
    statistics.step()
    assert statistics.below(1.1)[0].tolist() == [f for f in range(80) if f not in (3, 4, 7)]


def test_reset_features_start_again_and_pruned_ones_come_back(model):
    layer = model.mfn_layers[2]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    length = 0.2 * layer.encoder.weight.norm(dim=-1).mean()
    model.prune_features(2, [1, 7])
    model.reset_features(2, torch.tensor([7, 9]), generator=torch.Generator().manual_seed(5))
    directions = F.normalize(torch.randn(2, 32, generator=torch.Generator().manual_seed(5)), dim=-1).double()
    close(layer.decoder.weight[[7, 9]], directions)
    torch.testing.assert_close(layer.encoder.weight[[7, 9]], directions * length)
    close(layer.encoder.bias[[7, 9]], -layer.encoder.weight[[7, 9]] @ layer.decoder.bias)
    assert model.config.pruned_features == {"2": [1]}
    edited = {"encoder.weight": [7, 9], "encoder.bias": [7, 9], "decoder.weight": [1, 7, 9]}
    for name, parameter in model.named_parameters():
        changed = (parameter != before[name]).reshape(len(parameter), -1).any(-1).nonzero().flatten().tolist()
        assert changed == (edited.get(name.partition(".2.mfn.")[2], [])), name
    model.reset_features(2, [1])
    assert layer.rows is None
    with model.steer({(2, 7): Clamp(3.0)}):
        assert model(**tokens(2, 9), output_codes=True).codes[2].to_dense()[..., 7].eq(3.0).all()


def test_merged_duplicates(model):
    """Merges three equal features. The output stays the same on tokens where TopK keeps all three.

    The output also stays the same where TopK keeps neither the three nor the merged feature.
    """
    h = model(**tokens(8, 16), output_reconstructions=True).reconstructions[0].residual
    layer = model.mfn_layers[0]
    with torch.no_grad():
        layer.encoder.bias[20] += 0.5  # so that feature 20 is often active
        layer.decoder.weight.copy_(F.normalize(layer.decoder.weight, dim=-1))
        for twin in (50, 51):
            for parameter in (layer.encoder.weight, layer.encoder.bias, layer.decoder.weight):
                parameter[twin] = parameter[20]
    before = layer(h)
    a = layer.standardise(h)[0] @ layer.encoder.weight.T + layer.encoder.bias
    threshold = a.topk(8, dim=-1).values[..., -1]
    all_active, none = a[..., 20] > threshold, 3 * a[..., 20] < threshold.clamp_min(0)
    model.merge_features(0, 20, [50, 51])
    after = layer.encode(h).to_dense()
    assert all_active.sum() >= 5
    assert none.sum() >= 5
    assert not (all_active | none).all()
    for same in (all_active, none):
        close(layer(h)[same], before[same])
    close(after[all_active][:, 20], 3 * a[all_active][:, 20])
    assert not after[..., [50, 51]].any()
    assert model.config.pruned_features == {"0": [50, 51]}


def test_a_merged_feature_is_the_projection_of_what_its_parts_write(model):
    layer = model.mfn_layers[2]
    model.set_k(80)
    with torch.no_grad():
        mixed = F.normalize(layer.decoder.weight[4] + 0.3 * layer.decoder.weight[5], dim=-1)
        layer.decoder.weight[5] = mixed
        layer.encoder.weight[5] = 2 * layer.encoder.weight[4] + 0.1 * layer.encoder.weight[5]
        layer.encoder.bias[[4, 5]] = 3.0  # active on almost every token
    h = torch.randn(50, 32, dtype=torch.float64)
    z = layer.encode(h).to_dense()[..., [4, 5]]
    lengths, directions = layer.encoder.weight[[4, 5]].norm(dim=-1), layer.decoder.weight[[4, 5]].clone()
    mean = (lengths[:, None] * directions).sum(0)
    mean = mean / mean.norm()
    both = (z > 0).all(-1)
    model.merge_features(2, 4, [5])
    close(layer.decoder.weight[4], mean)
    assert both.sum() > 20
    close(layer.encode(h).to_dense()[both][:, 4], (z @ directions @ mean)[both])


def test_duplicates_are_those_of_the_whole_matrix():
    model = make_mfn(make_base("gpt2-tied"), layers=[1], num_features=60)
    layer = model.mfn_layers[1]
    with torch.no_grad():
        layer.decoder.weight[[7, 33]] = layer.decoder.weight[[50, 51]]
        layer.decoder.weight[59] = F.normalize(layer.decoder.weight[7] + 0.1 * layer.decoder.weight[1], dim=-1)
    model.prune_features(1, [33])
    model.compact(keep_competition=False)
    kept = [f for f in range(60) if f != 33]
    directions = torch.zeros(60, 32)
    directions[kept] = layer.decoder.weight.detach()
    encoders = torch.zeros(60, 32)
    encoders[kept] = F.normalize(layer.encoder.weight.detach(), dim=-1)
    for threshold in (0.3, 0.95):
        expected = {
            (i, j): ((directions[i] @ directions[j]).item(), (encoders[i] @ encoders[j]).item())
            for i in range(60)
            for j in range(i + 1, 60)
            if directions[i] @ directions[j] >= threshold
        }
        found = find_duplicates(model, 1, threshold, block=7)
        assert {pair[:2]: pair[2:] for pair in found} == {
            names: pytest.approx(cosines, abs=1e-5) for names, cosines in expected.items()
        }
        assert [pair.direction_cosine for pair in found] == sorted((pair[2] for pair in found), reverse=True)
    assert {pair[:2] for pair in found} == {(7, 50), (7, 59), (50, 59)}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.prune_features(1, [0]), r"block 1 has no MFN layer.*\[0, 2\]"),
        (lambda m: m.prune_features(0, [3, 80]), "L0/80 does not exist; features are 0 to 79"),
        (lambda m: m.prune_features(0, [-1]), "L0/-1 does not exist"),
        (lambda m: m.prune_features(0, 7), "features are 7; give a list"),
        (lambda m: m.prune_features(0, "79"), "features are '79'; give a list"),
        (lambda m: m.prune_features(0, [1.0]), "features contain 1.0; an index is a whole number"),
        (lambda m: m.prune_features(0, torch.ones(80, dtype=torch.bool)), "features contain True"),
        (lambda m: m.reset_features(2, [80]), "L2/80 does not exist"),
        (lambda m: m.reset_features(2, [5, 60]), r"L2/60 was removed by compact\(\); it cannot start again"),
        (lambda m: m.merge_features(0, 4, []), r"others is \[\]; give at least one"),
        (lambda m: m.merge_features(0, 4, [6, 4]), r"others is \[6, 4\]; .* the kept one, 4"),
        (lambda m: m.merge_features(0, 3, [4]), "L0/3 is pruned"),
        (lambda m: m.merge_features(0, 6, [7]), "L0/7 is not a duplicate: its direction has cosine -"),
        (lambda m: m.steer({(0, 3): Clamp(1.0)}), "L0/3 is pruned and has no effect"),
        (lambda m: m.steer({"L2/60": Ablate()}), "L2/60 is pruned"),
        (lambda m: find_duplicates(m, 0, 0.0), r"threshold is 0\.0; it must be a cosine above 0"),
        (lambda m: find_duplicates(m, 1), "block 1 has no MFN layer"),
    ],
)
def test_bad_edits_change_nothing(edit, message):
    model = make_mfn(make_base("llama-tied"), layers=[0, 2])
    model.mfn_layers[0].decoder.weight.data[7] = -model.mfn_layers[0].decoder.weight.data[6]
    model.mfn_layers[0].encoder.weight.data[7] *= 0.5
    prune(model).compact()
    config = model.config.to_dict()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        edit(model)
    assert model.config.to_dict() == config
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_compact_refuses():
    model = make_mfn(make_base("llama-tied"), layers=[0, 2])
    prune(model, {0: [1], 2: range(74)})
    with pytest.raises(ValueError, match=r"layer 2 has 6 features that are not pruned; .* at least 8, which is k"):
        model.compact(keep_competition=False)
    assert model.config.removed_decoder_rows == {}
    prune(model, {2: range(80)})
    assert torch.isfinite(model(**tokens(2, 9)).logits).all()
    with pytest.raises(ValueError, match="layer 2 has 0 features that are not pruned"):
        model.compact()
    assert len(model.mfn_layers[0].decoder.weight) == 80


def test_a_shared_decoder_is_pruned_by_layer_and_keeps_its_rows(family_base):
    model = make_mfn(family_base.double(), shared_decoder=True)
    batch, pruned = tokens(4, 16), {0: [3, 9], 2: [9, 10, 60]}
    expected = ablated(model, batch, pruned).logits
    close(prune(model, pruned)(**batch).logits, expected)
    for edit in (model.compact, lambda: model.reset_features(0, [3]), lambda: model.merge_features(0, 1, [2])):
        with pytest.raises(ValueError, match="shared_decoder=True"):
            edit()
    close(model(**batch).logits, expected)


def test_weights_that_cannot_be_edited():
    model = make_mfn(make_base("llama-tied"), layers=[0, 2])
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["mfn"]))
    with torch.device("meta"):
        empty = MFNForCausalLM(model.config)
    for where, message in ((model, "layer 0 is wrapped in a ModulesToSave"), (empty, "layer 0 are not in memory")):
        with pytest.raises(ValueError, match=message):
            where.prune_features(0, [3])
        assert where.config.pruned_features == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pruned_features": {"1": [3]}}, r"pruned_features has layer '1'; layers with features are \[0, 2\]"),
        ({"pruned_features": {"0": [80]}}, "pruned_features has L0/80; features are 0 to 79"),
        ({"removed_decoder_rows": {"0": [3]}}, "removed_decoder_rows has L0/3, which is not in pruned_features"),
        (
            {"pruned_features": {"0": [3]}, "removed_encoder_rows": {"0": [3]}},
            "removed_encoder_rows has L0/3, which is not in removed_decoder_rows",
        ),
    ],
)
def test_bad_configs(settings, message):
    with pytest.raises(ValueError, match=message):
        MFNConfig(text_config=make_base("llama-tied").config, layers=[0, 2], num_features=80, k=8, **settings)
    with pytest.raises(ValueError, match="unknown setting"):
        MFNForCausalLM.from_base(make_base("llama-tied"), num_features=80, k=8, **settings)

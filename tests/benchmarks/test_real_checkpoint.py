"""Stages of `benchmarks/smollm2/real_checkpoint.py` on a tiny base, and their figures against independent ones."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HIDDEN, make_base, make_mfn, tokens
from datasets import Dataset

from benchmarks.common import corpora
from benchmarks.smollm2 import real_checkpoint, sparsify_baseline
from benchmarks.smollm2.splicing import constant, next_token_losses, reconstruction_figures, spliced, through
from benchmarks.smollm2.stages import WINDOW_SETTINGS, CheckpointStudy, Trained
from modeling_mfn import MFNForCausalLM
from modeling_mfn.evaluation.measures.perplexity import perplexity
from modeling_mfn.training.activation_cache import ActivationCache

M, K, T = 80, 8, 16


def random_coder(seed=0):
    """Random weights in the form of a sparsify autoencoder."""
    torch.manual_seed(seed)
    encoder = torch.nn.Linear(HIDDEN, M)
    return SimpleNamespace(encoder=encoder, W_dec=torch.randn(M, HIDDEN) * 0.3, b_dec=torch.randn(HIDDEN) * 0.1)


def train_nothing(model, cache, rows, folder, **settings):
    for layer in model.mfn_layers.values():
        sparsify_baseline.adopt(layer, random_coder(layer.layer_index))


def tiny_study(folder, layers):
    """Makes a study of a random base and a few random windows."""
    make_base("llama-tied").save_pretrained(folder / "base")
    counts = {"train": 12, "joint": 8, "validation": 3, "held_out": 6}
    windows = {name: tokens(rows, T, seed)["input_ids"].numpy() for seed, (name, rows) in enumerate(counts.items())}
    made = CheckpointStudy(
        folder / "base", folder / "results", folder, layers=layers, num_features=M, k=K, window=T, batch=4
    )
    np.savez(
        folder / "windows.npz", settings=json.dumps({name: getattr(made, name) for name in WINDOW_SETTINGS}), **windows
    )
    return made


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Study after all of its stages."""
    made = tiny_study(tmp_path_factory.mktemp("study"), layers=(0, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sparsify_baseline, "train", train_nothing
        )  # the development environment does not contain the sparsify package
        real_checkpoint.run_stages(made)
    return made


def losses_of(model, rows):
    """Domain -> next-token loss, by the package's own evaluation."""
    parts = dict(zip(corpora.DOMAINS, rows.chunk(len(corpora.DOMAINS)), strict=True)) | {"mean": rows}
    return {
        name: math.log(perplexity(model, Dataset.from_dict({"input_ids": part.tolist()})))
        for name, part in parts.items()
    }


@pytest.mark.parametrize("method", real_checkpoint.TRAINED)
def test_all_layers_cost_what_the_saved_model_costs_at_alpha_1(study, method):
    record, held_out = study.result(f"evaluate/{method}"), study.windows["held_out"]
    model = MFNForCausalLM.from_pretrained(study.folder / method)
    model.set_blend(0.0)
    assert record["base_loss"] == pytest.approx(losses_of(model, held_out), abs=1e-3)
    model.set_blend(1.0)
    assert record["all_positions"]["all_layers"]["loss"] == pytest.approx(losses_of(model, held_out), abs=1e-3)
    assert record["layer_2"]["active_features"] <= K


@pytest.mark.parametrize("stage", ["features", "joint"])
def test_mfn_layers_alone_are_trained_with_the_best_learning_rate_tried(study, stage):
    record = study.result(stage)
    best = min(record["tried"], key=lambda tried: tried["validation_loss"])
    assert (best["settings"], best["validation_loss"]) == (record["chosen"], record["validation_loss"])
    started = study.convert() if stage == "features" else MFNForCausalLM.from_pretrained(study.folder / "features")
    trained = MFNForCausalLM.from_pretrained(study.folder / stage)
    moved = {name for name, value in trained.state_dict().items() if not torch.equal(value, started.state_dict()[name])}
    assert moved == {name for name in trained.state_dict() if ".mfn." in name}
    trained.set_blend(1.0)
    loss = losses_of(trained, study.windows["validation"])["mean"]
    assert record["validation_loss"] == pytest.approx(loss, abs=1e-3)
    told = json.loads((study.folder / stage / "training_record.json").read_text())
    assert told["arguments"]["learning_rate"] == record["chosen"]["learning_rate"]


def test_a_setting_that_was_tried_is_not_tried_again(study, monkeypatch, tmp_path):
    study = dataclasses.replace(study, folder=tmp_path / "models", results=tmp_path / "results")
    models = [make_mfn(make_base("llama-tied"), seed=seed) for seed in (1, 2, 3)]
    losses = {id(model): loss for model, loss in zip(models, (3.0, 2.0, 2.5), strict=True)}
    monkeypatch.setattr(CheckpointStudy, "validation_loss", lambda self, model: losses[id(model)])
    tried = []

    def train(rows, lr):
        if lr == 3 and len(tried) == 2:
            raise KeyboardInterrupt
        tried.append(lr)
        return Trained(models[lr - 1])

    settings = [{"lr": lr} for lr in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        study.fit("x", train, settings, range(24), 4)
    tried.append("again")
    (study.folder / "tries" / "y-0").mkdir()  # belongs to another stage
    record = study.fit("x", train, settings, range(24), 4)
    assert tried == [1, 2, "again", 3]
    assert (record["chosen"], record["validation_loss"]) == ({"lr": 2}, 2.0)
    assert [of["validation_loss"] for of in record["tried"]] == [3.0, 2.0, 2.5]
    kept = MFNForCausalLM.from_pretrained(study.folder / "x")
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), models[1].parameters(), strict=True))
    assert sorted(str(each.relative_to(study.folder)) for each in study.folder.glob("*/*-*")) == ["tries/y-0"]
    study.fit("z", lambda rows, lr: Trained(models[0]), [{"lr": 1}], range(24), 4)
    (study.folder / "tries" / "y-0").rmdir()
    study.fit("x", lambda rows, lr: Trained(models[1]), [{"lr": 1}], range(24), 4)
    assert {folder.name for folder in study.folder.iterdir()} == {"x", "z"}


def test_ablation_recovers_nothing_of_itself_and_all_else_is_on_the_same_scale(study):
    summary = study.result("summary")
    for positions in real_checkpoint.POSITIONS:
        for methods in summary[positions].values():
            for ablation in ("zero", "mean"):
                assert set(methods[ablation][f"recovered_of_{ablation}"].values()) == {0.0}
            found = methods["features"]
            share = 1 - found["delta"]["mean"] / methods["mean"]["delta"]["mean"]
            assert found["recovered_of_mean"]["mean"] == pytest.approx(share, abs=2e-2)


def test_mean_ablation_against_a_plain_base_whose_block_gives_out_a_constant(study):
    base = make_base("llama-tied")
    block, found = base.model.layers[2], []
    reading = block.post_attention_layernorm.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        base(study.windows["train"])
        reading.remove()
        mean = found[0].mean((0, 1))
        out = mean + block.mlp(block.post_attention_layernorm(mean))
    block.register_forward_hook(lambda module, args, output: out.expand_as(output))
    record = study.result("evaluate/mean")["all_positions"]["layer_2"]
    assert record["loss"] == pytest.approx(losses_of(base, study.windows["held_out"]), abs=2e-3)


def test_a_stage_with_a_result_is_left_out(study, capsys):
    file = study.results / "evaluate" / "zero.json"
    before = file.read_text()
    real_checkpoint.run_stages(study)
    assert capsys.readouterr().out == ""
    assert file.read_text() == before
    assert json.loads(before)["settings"]["num_features"] == M


def test_zeros_in_a_block_are_a_plain_base_whose_block_gives_out_zeros():
    base, rows = make_base("llama-tied"), tokens(3, T)["input_ids"]
    model = make_mfn(base, layers=[1], alpha=0.0)
    with spliced(model, {1: constant(torch.zeros(HIDDEN))}):
        ours = next_token_losses(model, rows)
    base.model.layers[1].register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    assert ours.mean().item() == pytest.approx(base(rows, labels=rows).loss.item(), rel=1e-5)


@torch.no_grad()
def test_splicing_identity_features_and_the_first_position():
    rows = tokens(3, T)["input_ids"]
    model = make_mfn(make_base("gpt2-tied"), layers=[0, 2], alpha=0.0)
    base = model(rows).logits
    with spliced(model, {0: lambda h: h, 2: lambda h: h}):
        assert torch.equal(model(rows).logits, base)
    zeros = {2: constant(torch.zeros(HIDDEN))}
    with spliced(model, zeros, keep_first=True):
        kept = model(rows).logits
    assert torch.equal(kept[:, 0], base[:, 0])
    assert not torch.allclose(kept[:, 1], base[:, 1], atol=0.1)
    with spliced(model, {n: through(layer) for n, layer in model.mfn_layers.items()}):
        through_features = model(rows).logits
    assert torch.equal(model(rows).logits, base)
    model.set_blend(1.0)
    torch.testing.assert_close(through_features, model(rows).logits)


@torch.no_grad()
def test_reconstruction_figures_against_dense_equations():
    layer = make_mfn(make_base("llama-tied"), layers=[1]).mfn_layers[1].double()
    h = torch.randn(5, T, HIDDEN, dtype=torch.float64) * 3 + 1
    h[:, 0] *= 50
    std, mean = h.std(-1, keepdim=True), h.mean(-1, keepdim=True)
    x = (h - mean) / (std + layer.epsilon)
    z = torch.relu(x @ layer.encoder.weight.T + layer.encoder.bias)
    z = z * (z >= z.topk(layer.config.k).values[..., -1:])
    h_hat = (z @ layer.decoder.weight + layer.decoder.bias) * std + mean

    def explained(of, other):
        return 1 - (of - other).square().sum().item() / (of - of.mean((0, 1))).square().sum().item()

    assert reconstruction_figures(layer, h) == pytest.approx(
        {
            "explained_variance": explained(h[:, 1:], h_hat[:, 1:]),
            "explained_variance_all": explained(h, h_hat),
            "explained_variance_standardised": explained((h - mean) / std, (h_hat - mean) / std),
            "active_features": (z > 0).sum(-1).double().mean().item(),
            "dead_share": (~(z > 0).any(0).any(0)).double().mean().item(),
        },
        rel=1e-6,
    )


@torch.no_grad()
@pytest.mark.parametrize("input_norm", ["none", "layer"])
def test_an_adopted_autoencoder_computes_sparsifys_equations(input_norm):
    layer, coder = make_mfn(make_base("llama-tied"), layers=[1], input_norm=input_norm).mfn_layers[1], random_coder()
    sparsify_baseline.adopt(layer, coder)
    h = torch.randn(40, HIDDEN) * 2 + 0.5
    std, mean = torch.std_mean(h, -1, keepdim=True)
    x = h if input_norm == "none" else (h - mean) / (std + 1e-5)
    pre_activations = torch.relu(coder.encoder(x - coder.b_dec))
    z = pre_activations * (pre_activations >= pre_activations.topk(K).values[:, -1:])
    x_hat = z @ coder.W_dec + coder.b_dec
    torch.testing.assert_close(through(layer)(h), x_hat if input_norm == "none" else x_hat * std + mean)


def test_taps_give_out_what_encoders_read(tmp_path):
    model = make_mfn(make_base("llama-tied"), layers=[0, 2])
    rows = Dataset.from_dict({"input_ids": tokens(6, T)["input_ids"].tolist()})
    cache = ActivationCache.write(model, rows, tmp_path, dtype="float32")
    taps, seen = sparsify_baseline.Taps(model.mfn_layers, cache), {}
    for name, tap in taps.taps.items():
        tap.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
    taps(torch.tensor([[4] * T, [1] * T]))
    for place, (number, layer) in enumerate(model.mfn_layers.items()):
        h = torch.stack([cache[4]["residuals"][place], cache[1]["residuals"][place]])
        torch.testing.assert_close(seen[str(number)], layer.standardise(h)[0])


def test_windows_are_equal_shares_and_no_part_has_those_of_another(tmp_path, monkeypatch):
    numbered = {domain: np.arange(1000 * place, 1000 * place + 80) for place, domain in enumerate(corpora.DOMAINS)}
    monkeypatch.setattr(corpora, "texts", lambda domain: (numbered[domain], numbered[domain] + 500))
    monkeypatch.setattr(corpora, "windows", lambda text, tokenizer, length: np.repeat(text[:, None], length, 1))
    monkeypatch.setattr("benchmarks.smollm2.stages.AutoTokenizer.from_pretrained", lambda folder: None)
    study = CheckpointStudy(
        tmp_path, tmp_path, tmp_path, window=T, train_tokens=36 * T, joint_tokens=20 * T, held_out_tokens=5 * T
    )
    found = {name: rows[:, 0] for name, rows in study.windows.items()}
    assert {name: len(rows) for name, rows in found.items()} == {
        "train": 36,
        "joint": 18,
        "validation": 12,
        "held_out": 15,
    }
    assert len(torch.cat(list(found.values())).unique()) == 81
    for rows in found.values():
        assert len((rows // 1000).bincount().unique()) == 1
    assert (found["held_out"] % 1000 >= 500).all()
    assert (found["train"] % 1000 < 500).all()
    with pytest.raises(ValueError, match=r"'joint_tokens': 320.*choose another --name, or delete the folder"):
        _ = dataclasses.replace(study, joint_tokens=4 * T).windows


def test_the_order_of_training_is_a_permutation_an_epoch(study):
    order = study.order()
    assert len(order) == 36
    assert all(sorted(order[start : start + 12]) == list(range(12)) for start in (0, 12, 24))
    assert order[:12] != order[12:24]

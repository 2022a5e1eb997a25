"""The objective around the losses: perturbations, the second pass, drawn tokens, and the weight of each loss."""

import copy

import pytest
import torch
from conftest import make_base, make_mfn, tokens
from trainings import arguments, rows

from modeling_mfn import MFNTrainer
from modeling_mfn.model.mfn_pass import ReconstructionRequest
from modeling_mfn.training.losses import stability_loss
from modeling_mfn.training.objective import Perturbation, tokens_of


def test_noise_is_a_share_of_the_rms_and_dropout_a_share_of_the_entries():
    torch.manual_seed(0)
    h = torch.randn(200, 300) * torch.logspace(-2, 2, 200)[:, None]
    noise = Perturbation("noise", 0.3)(h) - h
    shares = noise.square().mean(-1).sqrt() / h.square().mean(-1).sqrt()
    assert shares.mean().item() == pytest.approx(0.3, rel=0.02)
    assert shares.max() < 0.4
    dropped = Perturbation("dropout", 0.25)(h)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(dropped[dropped != 0], h[dropped != 0] / 0.75)


@pytest.mark.parametrize(
    ("where", "base", "brought"),
    [
        ("layer", "llama-tied", "input_ids"),
        ("layer", "gpt2-tied", "input_ids"),
        ("model", "llama-tied", "input_ids"),
        ("model", "gpt2-tied", "input_ids"),
        ("model", "gpt2-tied", "token_type_ids"),
        ("model", "llama-tied", "inputs_embeds"),
    ],
)
def test_stability_compares_with_the_code_of_a_perturbed_input(where, base, brought, tmp_path, monkeypatch):
    """Compares the stability loss with codes computed by hand, under a deterministic perturbation."""
    model = make_mfn(make_base(base), layers=[0, 2])
    args = arguments(tmp_path, lambda_stab=1.0, stability_pass=where, stability_fraction=1.0, normalize_losses=False)
    data = rows(6, padded=True)
    trainer = MFNTrainer(model, args, eval_dataset=data)
    monkeypatch.setattr(trainer.feature_objective, "perturbation", lambda h: h.roll(1, -1) * 0.5 + h)
    batch = {name: torch.tensor(data[name]) for name in data.column_names}
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    if brought == "token_type_ids":
        batch["token_type_ids"] = batch["input_ids"].flip(1)
    elif brought == "inputs_embeds":
        del batch["input_ids"]
        batch["inputs_embeds"] = embeddings
    measured = trainer.compute_loss(model, batch)
    parts = trainer._in_evaluation.take(by_layer=False)
    whole = 2 * (parts["recon_loss"] + parts["stab_loss"]) + parts["util_loss"]
    assert measured.item() == pytest.approx(whole, rel=1e-5)

    _labels, mask = batch.pop("labels"), batch["attention_mask"]
    clean = model(**batch, output_reconstructions=True).reconstructions
    if where == "layer":
        codes = {
            layer: model.mfn_layers[layer].encode(trainer.feature_objective.perturbation(clean[layer].residual))
            for layer in (0, 2)
        }
    else:
        batch = {name: value for name, value in batch.items() if name in ("attention_mask", "token_type_ids")}
        codes = model(inputs_embeds=embeddings.roll(1, -1) * 0.5 + embeddings, **batch, output_codes=True).codes
    expected = sum(stability_loss(clean[layer].code, codes[layer], mask) for layer in (0, 2)) / 2
    assert parts["stab_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert expected > 0.1


def test_every_lambda_weighs_its_own_part(tmp_path):
    """The gradient is linear in the lambdas."""
    lambdas = ("recon", "rate", "comp", "stab", "util", "aux")
    batch = {name: torch.tensor(rows(6, padded=True)[name]) for name in ("input_ids", "labels", "attention_mask")}

    def gradient(**weights):
        model = make_mfn(make_base("llama-tied").double(), alpha=0.7)
        settings = {f"lambda_{name}": weights.get(name, 0.0) for name in lambdas}
        trainer = MFNTrainer(model, arguments(tmp_path, rate_floor=1.0, **settings), train_dataset=rows(6))
        trainer.statistics.rates[:, ::3] = 0
        trainer._shares.tokens, trainer.current_gradient_accumulation_steps = batch["attention_mask"].sum(), 1
        model.train()
        torch.manual_seed(4)
        trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(50)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None] + [torch.zeros(0)])

    weights = {"recon": 0.5, "rate": 2.0, "comp": 3.0, "stab": 0.7, "util": 1.5, "aux": 0.25}
    whole = gradient(**weights)
    added = torch.zeros_like(whole)
    for name, weight in weights.items():
        others = dict.fromkeys(lambdas, 1e-12)  # not 0, so that random draws are the same as with all losses
        added += (gradient(**(others | {name: 1.0})) - gradient(**others)) * weight
    torch.testing.assert_close(added, whole, atol=1e-7, rtol=1e-5)  # cross entropy is computed in float32


def test_tokens_that_are_drawn_for_stability_are_real_ones(tmp_path):
    model = make_mfn(make_base("gpt2-tied"))
    args = arguments(tmp_path, lambda_stab=1.0, stability_fraction=0.5)
    objective = MFNTrainer(model, args, train_dataset=rows(4)).feature_objective
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    chosen = [objective.request(mask, {}).chosen for _ in range(50)]
    assert all(len(set(each.tolist())) == 2 for each in chosen)
    assert set(torch.cat(chosen).tolist()) == {0, 1, 2, 4}
    out = model(**tokens(2, 4), reconstruction_request=objective.request(mask, {})).reconstructions
    assert all(item.perturbed.values.shape == (2, 8) for item in out.values())


class Elsewhere:
    """Stands in for indices on another device, which are unusable before `to` moves them."""

    def __init__(self, indices):
        self.indices = indices

    def to(self, device):
        return self.indices.to(device)


def test_indices_are_brought_to_the_layer_s_device():
    model = make_mfn(make_base("llama-tied"), layers=[1])
    chosen, features = torch.tensor([2, 5, 7]), torch.tensor([3, 9, 40])
    found, reset = [], []
    for place in (lambda indices: indices, Elsewhere):
        request = ReconstructionRequest(
            perturb=lambda h: h * 2 + 1, chosen=place(chosen), revive={1: place(features)}, revive_k=2
        )
        item = model(**tokens(2, 4), reconstruction_request=request).reconstructions[1]
        found.append((item.perturbed.values, item.revived, tokens_of(item.code, place(chosen)).values))
        layer = copy.deepcopy(model.mfn_layers[1])
        layer.reset_features(place(features), torch.eye(3, 32))
        reset.append(layer)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    for ours, theirs in zip(reset[0].parameters(), reset[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)

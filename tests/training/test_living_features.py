"""Live features of unit norm: statistics, the auxiliary loss, restarts of dead features, optimizers."""

import math

import pytest
import torch
from conftest import make_base, make_mfn, tokens
from peft import LoraConfig, get_peft_model
from trainings import arguments, history, rows, train
from transformers import TrainerCallback

from modeling_mfn import MFNTrainer
from modeling_mfn.model.mfn_pass import ReconstructionRequest
from modeling_mfn.training.activation_cache import CachedResiduals
from modeling_mfn.training.feature_sums import FeatureSums
from modeling_mfn.training.measurements import Measurements
from modeling_mfn.training.objective import FeatureObjective
from modeling_mfn.training.statistics import FeatureStatistics


def kill(model, layer, features):
    """Lowers the bias of features so far that no token activates them."""
    with torch.no_grad():
        model.mfn_layers[layer].encoder.bias[features] = -100.0


def test_statistics_are_those_of_a_brute_force_count():
    model = make_mfn(make_base("llama-tied").double(), layers=[0, 2])
    inputs = tokens(5, 12) | {"attention_mask": torch.ones(5, 12, dtype=torch.long)}
    inputs["attention_mask"][3, 4:] = 0
    items = model(**inputs, output_reconstructions=True).reconstructions
    statistics, measurements = FeatureStatistics(model.config, window=1000), Measurements(model.config, "cpu")
    for half in (slice(3), slice(3, 5)):
        part = {name: tensor[half] for name, tensor in inputs.items()}
        found = model(**part, output_reconstructions=True).reconstructions
        sums = FeatureSums.of(model.mfn_layers, found, part["attention_mask"])
        measurements.count(sums)
        statistics.add(sums)
        statistics.step()
    silent = statistics.silent_for.clone()
    figures = measurements.take(by_layer=True)
    for place, layer in enumerate((0, 2)):
        z = items[layer].code.to_dense()[inputs["attention_mask"].bool()].detach()
        h, h_hat = (part[inputs["attention_mask"].bool()].detach() for part in items[layer][:2])
        std = h.std(-1, keepdim=True) + 1e-5
        x, x_hat = (h - h.mean(-1, keepdim=True)) / std, (h_hat - h.mean(-1, keepdim=True)) / std
        variance = (x - x.mean(0)).square().sum()
        rates = (z > 0).double().mean(0)
        assert figures[f"layer_{layer}/explained_variance"] == pytest.approx(
            float(1 - (x - x_hat).square().sum() / variance), abs=1e-4
        )
        assert figures[f"layer_{layer}/active_features"] == pytest.approx(float(rates.sum()))
        assert figures[f"layer_{layer}/firing_rate_cv"] == pytest.approx(float(rates.std() / rates.mean()), rel=1e-5)
        assert (silent[place, rates == 0] == 52).all()
        assert torch.equal(statistics.below(1.5 / 52)[layer], (rates < 1.5 / 52).nonzero()[:, 0])
        # parts of 36 and 16 tokens; a token's weight falls by a factor e per 1,000 tokens
        ages = torch.tensor([16.0] * 36 + [0.0] * 16).double()
        first, second = 1 - math.exp(-36 / 1000), 1 - math.exp(-16 / 1000)
        shares = torch.where(ages > 0, first * math.exp(-16 / 1000) / 36, second / 16).double()
        expected = (z > 0).T.double() @ (shares / shares.sum())
        torch.testing.assert_close(statistics.rates[place].double(), expected, atol=1e-6, rtol=1e-5)
        u = (h - h.mean(-1, keepdim=True)) / (h - h.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt()
        common = (u * (shares / shares.sum())[:, None]).sum(0)
        assert statistics.variation()[place] == pytest.approx(float(1 - common.square().mean()), abs=1e-4)
    assert statistics.below(1 / 60) == {}  # 52 tokens are too few to measure such a low rate


def test_the_reconstruction_loss_is_a_share_of_what_varies(tmp_path):
    """Adds one vector to every token's embedding. The loss is still the unexplained share of variance."""
    base = make_base("llama-tied")
    with torch.no_grad():
        embeddings = base.get_input_embeddings().weight
        embeddings += 3 * embeddings.std() * torch.randn(32, generator=torch.Generator().manual_seed(0))
    model = make_mfn(base, alpha=0.0)
    args = arguments(
        tmp_path, max_steps=40, learning_rate=1e-12, logging_steps=20, lambda_util=0.0, alpha_end=0.0, rate_window=10**6
    )
    trainer = MFNTrainer(model, args, train_dataset=rows(200))
    trainer.train()
    layers = trainer.statistics.variation()
    assert layers[0] < 0.4
    recon, variance = (history(trainer, name)[-1] for name in ("recon_loss", "explained_variance"))
    assert recon == pytest.approx(1 - variance, rel=0.05)
    assert trainer.evaluate(rows(200))["eval_recon_loss"] == pytest.approx(1 - variance, rel=0.05)


def test_the_auxiliary_loss_is_the_error_s_own_reconstruction():
    """Compares the loss with a dense transcription, in which the given features alone reconstruct the error."""
    model = make_mfn(make_base("gpt2-tied").double(), layers=[1])
    layer = model.mfn_layers[1]
    revive = torch.tensor([3, 9, 40, 41, 77])
    item = model(
        **tokens(2, 9), reconstruction_request=ReconstructionRequest(revive={1: revive}, revive_k=2)
    ).reconstructions[1]
    args = arguments("unused")
    loss = FeatureObjective(args, model.config).losses(item, torch.ones(2, 9), ReconstructionRequest())["aux"]

    h = item.residual.detach()
    mean, std = h.mean(-1, keepdim=True), h.std(-1, keepdim=True)
    x = (h - mean) / (std + 1e-5)
    a = x @ layer.encoder.weight.T + layer.encoder.bias
    mask = torch.zeros(80, dtype=torch.bool)
    mask[revive] = True
    a = a.masked_fill(~mask, -torch.inf)
    z = torch.where(a >= a.topk(2, dim=-1).values[..., -1:], a, 0)
    assert (z < 0).any()
    z = z + (z.relu() - z).detach()  # straight-through ReLU: negative values count as 0 and keep their gradient
    error = (h - item.reconstructed).detach()
    missing = error - std * (z @ layer.decoder.weight)
    centred = error - error.mean(-1, keepdim=True)
    dense = (missing.square().sum(-1) / centred.square().sum(-1)).mean()
    assert loss.item() == pytest.approx(dense.item(), rel=1e-9)
    parameters = [layer.encoder.weight, layer.encoder.bias, layer.decoder.weight]
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters, retain_graph=True), torch.autograd.grad(dense, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)
        assert theirs[revive].abs().max() > 0
        assert not ours[~mask].any()


def fired(model, data):
    """Returns (m,), True for features of layer 0 that are active on some token."""
    code = model(torch.tensor(data["input_ids"]), output_codes=True).codes[0]
    return torch.bincount(code.indices[code.values > 0], minlength=80) > 0


def test_the_auxiliary_loss_brings_features_back(tmp_path):
    data = rows(64)
    dead = torch.arange(10)
    alive = {}
    for weight in (0.0, 1.0):
        model = make_mfn(make_base("llama-tied"), alpha=0.0, k=4)
        with torch.no_grad():
            model.mfn_layers[0].encoder.bias[dead] -= 1.6
        assert not fired(model, data)[dead].any()
        settings = {"lambda_aux": weight, "lambda_util": 0.0, "alpha_end": 0.0, "rate_window": 100}
        settings |= {"learning_rate": 0.02}
        trainer = train(tmp_path, model, data, max_steps=60, trainable="mfn", **settings)
        alive[weight] = int(fired(model, data)[dead].sum())
        assert any(value > 0 for value in history(trainer, "aux_loss")) if weight else True
    assert alive[1.0] >= alive[0.0] + 4


def test_dead_features_start_again_from_errors(tmp_path):
    data, dead = rows(64), torch.tensor([2, 30, 31])
    model = make_mfn(make_base("llama-tied"), alpha=0.0, k=8)
    kill(model, 0, dead)
    before = {name: p.detach().clone() for name, p in model.mfn_layers[0].named_parameters()}
    settings = {"rate_window": 90, "reinit_dead_every": 2, "lambda_aux": 0.0, "learning_rate": 1e-6, "max_steps": 2}
    trainer = train(tmp_path, model, data, **settings)
    layer = model.mfn_layers[0]
    changed = (layer.decoder.weight - before["decoder.weight"]).abs().amax(-1) > 1e-3
    assert changed[dead].all()
    assert torch.equal(changed, (layer.encoder.bias - before["encoder.bias"]).abs() > 1e-3)
    torch.testing.assert_close(layer.decoder.weight.norm(dim=-1), torch.ones(80), atol=1e-6, rtol=0)
    assert torch.equal(trainer.statistics.below(1e-6)[0], changed.nonzero()[:, 0])  # trained by the auxiliary loss
    direction = torch.nn.functional.normalize(layer.encoder.weight[dead], dim=-1)
    torch.testing.assert_close(direction, layer.decoder.weight[dead])
    for parameter in (layer.decoder.weight, layer.encoder.weight):
        memory = trainer.optimizer.state[parameter]
        assert not memory["exp_avg"][dead].any()
        assert memory["exp_avg"].any()
    assert (trainer.statistics.silent_for[0, dead] == 0).all()


def test_many_features_that_start_again_at_once_do_not_drown_the_others(tmp_path):
    """Restarts of unused features do not raise the loss. The auxiliary loss then activates some of these features."""
    data, dead = rows(64), torch.arange(40, 80)
    model = make_mfn(make_base("gpt2-tied"), alpha=0.0, k=8)
    for layer in range(3):
        kill(model, layer, dead)
    before = MFNTrainer(model, arguments(tmp_path), eval_dataset=data).evaluate()
    settings = {"rate_window": 40, "reinit_dead_every": 2, "lambda_util": 0.0, "alpha_end": 0.0, "trainable": "mfn"}
    train(tmp_path, model, data, max_steps=2, learning_rate=1e-9, **settings)
    started = MFNTrainer(model, arguments(tmp_path), eval_dataset=data).evaluate()
    assert started["eval_recon_loss"] < before["eval_recon_loss"] + 0.01
    settings |= {"rate_window": 10_000, "lambda_aux": 1.0}
    train(tmp_path, model, data, max_steps=60, learning_rate=0.02, **settings)
    assert fired(model, data)[dead].sum() > 10


def test_a_feature_of_a_shared_decoder_starts_again_where_no_layer_uses_it(tmp_path):
    model = make_mfn(make_base("llama-tied"), alpha=0.0, k=8, shared_decoder=True)
    for layer, features in {0: [2, 30, 31], 1: [2, 30], 2: [2, 30, 77]}.items():
        kill(model, layer, torch.tensor(features))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    used = torch.zeros(80, dtype=torch.bool)

    class Counts(MFNTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            for code in model(inputs["input_ids"], output_codes=True).codes.values():
                used[code.indices[code.values > 0]] = True
            return super().compute_loss(model, inputs, *args, **kwargs)

    settings = {"rate_window": 90, "reinit_dead_every": 2, "lambda_aux": 0.0, "learning_rate": 1e-6, "max_steps": 2}
    trainer = Counts(model, arguments(tmp_path, **settings), train_dataset=rows(64))
    trainer.train()
    assert used[[31, 77]].all()
    assert not used[[2, 30]].any()
    rows_of = next(iter(model.mfn_layers.values())).decoder.weight
    for layer, mfn in model.mfn_layers.items():
        assert mfn.decoder.weight is rows_of
        assert (trainer.statistics.silent_for[layer, ~used] == 0).all()
        direction = torch.nn.functional.normalize(mfn.encoder.weight[~used], dim=-1)
        torch.testing.assert_close(direction, rows_of[~used])
    for name, parameter in model.named_parameters():
        if name.endswith(("coder.weight", "encoder.bias")):
            changed = ((parameter - before[name]).abs().reshape(80, -1) > 1e-3).any(-1)
            assert torch.equal(changed, ~used), name


@pytest.mark.parametrize(
    ("wrap", "what"),
    [
        (CachedResiduals, "CachedResiduals"),
        (lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["mfn"])), "PEFT"),
    ],
    ids=["cached", "peft"],
)
def test_where_a_decoder_cannot_be_shared(tmp_path, wrap, what):
    model = make_mfn(make_base("llama-tied"), alpha=0.0, shared_decoder=True)
    args = arguments(tmp_path, lambda_util=0.0, alpha_end=0.0)
    with pytest.raises(ValueError, match=f"the model has shared_decoder=True, which is not available with .*{what}"):
        MFNTrainer(wrap(model), args, train_dataset=rows(4))


OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]


class KeepsWeights(torch.optim.SGD):
    """An optimizer whose state has a copy of the weights, and a quantised tensor in which 0 does not mean zero."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] |= {"z": parameter.detach().clone(), "state1": torch.full_like(parameter, 127).byte()}


@pytest.mark.parametrize("kind", [*OPTIMIZERS, KeepsWeights], ids=[*OPTIMIZERS, "keeps_weights"])
def test_what_an_optimizer_forgets_of_features_that_start_again(tmp_path, kind):
    """Zeroes the moments of restarted features only. All other state stays unchanged."""
    dead, model = torch.tensor([2, 30, 31]), make_mfn(make_base("llama-tied"), alpha=0.0, layers=[0])
    kill(model, 0, dead)
    before = {}

    class Keep(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
            for parameter in model.mfn_layers[0].parameters():
                before[parameter] = {n: v.clone() for n, v in optimizer.state[parameter].items() if torch.is_tensor(v)}

    settings = {"lambda_util": 0.0, "alpha_end": 0.0, "trainable": "mfn", "lambda_aux": 0.0}
    settings |= {"rate_window": 90, "reinit_dead_every": 2, "max_steps": 2}
    named = {} if kind is KeepsWeights else {"optim": kind}
    own = (None, None)
    if kind is KeepsWeights:
        own = (kind(model.mfn_layers[0].parameters(), lr=1e-3, momentum=0.9), None)
    args = arguments(tmp_path, **settings, **named)
    trainer = MFNTrainer(model, args, train_dataset=rows(64), callbacks=[Keep()], optimizers=own)
    trainer.train()
    others = torch.ones(80, dtype=torch.bool)
    others[trainer.statistics.below(1e-6)[0]] = False
    assert not others[dead].any()
    moments = ("exp_avg", "exp_avg_sq", "momentum_buffer", "sum", "square_avg")
    for parameter in model.mfn_layers[0].encoder.parameters():
        for name, memory in before[parameter].items():
            now = trainer.optimizer.state[parameter][name]
            if name in moments and now.shape == parameter.shape:
                assert not now[~others].any(), name
                assert torch.equal(now[others], memory[others]), name
            else:
                assert torch.equal(now, memory), name


@pytest.mark.parametrize(
    "settings",
    [{"optim": name, "weight_decay": 0.1} for name in OPTIMIZERS]
    + [{"bf16": True}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.0}, {"mfn_learning_rate": 0.02}],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_directions_keep_unit_norm(tmp_path, settings):
    """Directions have unit norm after training. No gradient that the optimizer sees has a part along its direction."""
    seen = []

    class Watched(MFNTrainer):
        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer(model)
            step = optimizer.step

            def watched(*args, **kwargs):
                for layer in self.model.mfn_layers.values():
                    rows = layer.decoder.weight
                    seen.append(((rows.grad * rows).sum(-1).abs().max() / rows.grad.abs().max()).item())
                return step(*args, **kwargs)

            optimizer.step = watched
            return optimizer

    model = make_mfn(make_base("llama-tied"), alpha=0.0)
    before = model.mfn_layers[1].decoder.weight.detach().clone()
    trainer = Watched(model, arguments(tmp_path, max_steps=3, **settings), train_dataset=rows(64))
    trainer.train()
    assert len(seen) == 9
    assert max(seen) < 1e-5
    for layer in model.mfn_layers.values():
        torch.testing.assert_close(layer.decoder.weight.norm(dim=-1), torch.ones(80), atol=1e-6, rtol=0)
    assert not torch.equal(model.mfn_layers[1].decoder.weight, before)


def test_mfn_layers_have_a_learning_rate_of_their_own(tmp_path):
    """Compares two equal steps of plain SGD. Only the learning rate of the MFN layers differs."""
    moved = {}
    for rate in (None, 0.5):
        model = make_mfn(make_base("gpt2-tied"), alpha=0.5)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        settings = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        train(tmp_path, model, max_steps=1, alpha_start=0.5, mfn_learning_rate=rate, **settings)
        moved[rate] = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    for name, change in moved[None].items():
        if "decoder.weight" not in name:  # directions are normalised after the step
            factor = 5 if ".mfn." in name else 1
            torch.testing.assert_close(moved[0.5][name], factor * change, atol=1e-6, rtol=1e-3)

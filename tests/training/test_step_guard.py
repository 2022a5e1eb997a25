"""Steps with a loss or gradient that is not finite do not reach the weights, a checkpoint or the record."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import make_base, make_mfn
from datasets import Dataset
from torch import nn
from trainings import arguments, history, rows
from transformers import Trainer, TrainerCallback

from modeling_mfn import ActivationCache, CachedResiduals, MFNTrainer
from modeling_mfn.training.step_guard import StepGuard

POISON = 1
"""Token whose embedding is nan. No other row has it."""
STEADY = {
    "train_sampling_strategy": "sequential",
    "lr_scheduler_type": "constant",
    "alpha_start": 0.5,
    "alpha_end": 0.5,
    "optim": "sgd",
    "rate_window": 100,
}
"""Settings with which a step depends on its own rows and the weights alone."""


def poisoned_model(name="llama-tied"):
    model = make_mfn(make_base(name), alpha=0.5, k=6)

    def poison(module, arguments, embeddings):
        return embeddings.masked_fill((arguments[0] == POISON).unsqueeze(-1), math.nan)

    model.get_input_embeddings().register_forward_hook(poison)
    return model


def poisoned_rows(count, *places):
    data = rows(count).to_dict()
    for place in places:
        data["input_ids"][place][5] = POISON
    return Dataset.from_dict(data)


def accelerator(distributed=DistributedType.NO, precision="no", scaler=None):
    """Returns what the guard asks of accelerate."""
    return SimpleNamespace(
        device=torch.device("cpu"), scaler=scaler, distributed_type=distributed, mixed_precision=precision
    )


def never():
    pytest.fail("the step was run again")


def strict_json(file):
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(file.read_text(), parse_constant=refuse)


@pytest.mark.halved
@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_batch_of_nan_stops_the_training_before_the_weights_move(tmp_path, name, accumulated):
    """The third step has the batch. The weights are those of two steps, and so is the last checkpoint."""
    size = 4 * accumulated
    settings = STEADY | {"gradient_accumulation_steps": accumulated, "save_strategy": "steps", "save_steps": 1}
    model, expected = poisoned_model(name), poisoned_model(name)
    MFNTrainer(expected, arguments(tmp_path / "two", max_steps=2, **STEADY, gradient_accumulation_steps=accumulated),
               train_dataset=rows(4 * size)).train()  # fmt: skip
    trainer = MFNTrainer(
        model,
        arguments(tmp_path / "out", max_steps=4, save_total_limit=1, **settings),
        train_dataset=poisoned_rows(4 * size, 3 * size - 1),
    )
    with pytest.raises(ValueError, match=r"the recon loss of layer 0 is not finite in step 3.*learning_rate"):
        trainer.train()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_steps_that_are_left_out_leave_no_trace(tmp_path, accumulated):
    """A training with the bad rows equals one without them. One bad step too many stops it."""
    size = 4 * accumulated
    settings = STEADY | {"gradient_accumulation_steps": accumulated}
    expected, clean = poisoned_model(), rows(4 * size)
    good = MFNTrainer(expected, arguments(tmp_path, max_steps=4, **settings), train_dataset=clean)
    good.train()
    data = clean.to_dict()
    bad = poisoned_rows(size, 1).to_dict()
    data = Dataset.from_dict({name: data[name][:size] + bad[name] * 2 + data[name][size:] for name in data})
    settings |= {"logging_steps": 2}
    model = poisoned_model()
    trainer = MFNTrainer(
        model, arguments(tmp_path / "out", max_steps=6, skip_nonfinite_steps=2, **settings), train_dataset=data
    )
    trainer.train()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # directions are normalised once more
    torch.testing.assert_close(trainer.statistics.rates, good.statistics.rates)
    assert history(trainer, "recon_loss")[-1] == pytest.approx(sum(history(good, "recon_loss")[-2:]) / 2)
    trainer.save_model()
    record = strict_json(tmp_path / "out" / "training_record.json")
    assert record["steps"] == 6
    assert all(math.isfinite(value) for entry in trainer.state.log_history for value in entry.values())

    settings |= {"reinit_dead_every": 2, "rate_window": 1}
    trainer = MFNTrainer(
        poisoned_model(), arguments(tmp_path, max_steps=6, skip_nonfinite_steps=1, **settings), train_dataset=data
    )
    with pytest.raises(ValueError, match="not finite in step 3"):
        trainer.train()


def test_cached_residuals_that_are_not_finite(tmp_path):
    model = make_mfn(make_base("gpt2-tied"), alpha=0.0, k=6)
    cache = ActivationCache.write(model, rows(16).select_columns(["input_ids"]), tmp_path / "cache")
    data = [dict(row) for row in cache]
    data[9]["residuals"] = data[9]["residuals"].clone()
    data[9]["residuals"][1, 4] = math.inf
    before = copy.deepcopy(model.state_dict())
    settings = {"alpha_end": 0.0, "lambda_util": 0.0, "max_steps": 4, "per_device_train_batch_size": 16}
    trainer = MFNTrainer(CachedResiduals(model), arguments(tmp_path, **settings), train_dataset=data)
    with pytest.raises(ValueError, match="the recon loss of layer 1 is not finite in step 1"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


class Interrupted(TrainerCallback):
    """Interrupts a training after its first batch, within a step."""

    def on_substep_end(self, *args, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_training_after_one_that_stopped_has_nothing_of_its_last_step(tmp_path, interrupted):
    settings = STEADY | {"gradient_accumulation_steps": 2, "reinit_dead_every": 1, "rate_window": 1}
    trainer = MFNTrainer(poisoned_model(), arguments(tmp_path, max_steps=2, **settings),
                         train_dataset=poisoned_rows(16, 1))  # fmt: skip
    if interrupted:
        trainer.add_callback(Interrupted)
    with pytest.raises(KeyboardInterrupt if interrupted else ValueError):
        trainer.train()
    trainer.remove_callback(Interrupted)
    trainer.train_dataset = rows(16)
    trainer.train()
    assert all(map(math.isfinite, history(trainer, "loss") + history(trainer, "explained_variance")))
    assert trainer.statistics.common.isfinite().all()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied"])
@pytest.mark.parametrize("clipped", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_named(tmp_path, name, clipped):
    """A nan that enters the backward pass in the middle of the model reaches the parameters below."""
    model = make_mfn(make_base(name), alpha=0.5, k=6)
    blocks = model.model.backbone.h if name.startswith("gpt2") else model.model.backbone.layers

    def poison(module, arguments, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.nan)

    blocks[1].mlp.register_forward_hook(poison)
    other = copy.deepcopy(model)
    data = rows(16)
    other(torch.tensor(data["input_ids"]), labels=torch.tensor(data["labels"])).loss.backward()
    reached = [each for each, parameter in other.named_parameters() if not parameter.grad.isfinite().all()][::-1]
    assert 10 < len(reached) < len(list(other.parameters())) - 5
    args = arguments(tmp_path, max_grad_norm=clipped, gradient_accumulation_steps=2, **STEADY)
    trainer = MFNTrainer(model, args, train_dataset=data)
    named = f"{', '.join(reached[:3])} and {len(reached) - 3} more"
    with pytest.raises(ValueError, match=f"^the gradient, of finite losses, of {named} is not finite in step 1;"):
        trainer.train()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("settings", [{"trainable_features": ["L0/1"]}, {"skip_nonfinite_steps": 2}])
def test_an_optimizer_that_moves_weights_in_the_backward_pass(tmp_path, settings):
    args = arguments(tmp_path, optim="galore_adamw_layerwise", optim_target_modules=["mfn"])
    guard = StepGuard(accelerator(), args)
    guard.observe(torch.tensor(math.nan), {}, {})
    with pytest.raises(ValueError, match="after the backward pass moved the weights"):
        guard.is_finite(1.0, 0, never)
    for name in ("galore_adamw_layerwise", "lomo", "adalomo"):
        with pytest.raises(ValueError, match=rf"{next(iter(settings))} is .* and optim is '{name}', which moves"):
            arguments(tmp_path, optim=name, **settings)


def test_deepspeed_makes_the_step_before_it_can_be_left_out(tmp_path, monkeypatch):
    set_up = Trainer.create_accelerator_and_postprocess

    def as_with_deepspeed(self):
        set_up(self)
        self.is_deepspeed_enabled = True

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "create_accelerator_and_postprocess", as_with_deepspeed)
        with pytest.raises(ValueError, match=r"skip_nonfinite_steps is 1; under DeepSpeed.*must be 0"):
            MFNTrainer(poisoned_model(), arguments(tmp_path, skip_nonfinite_steps=1), train_dataset=rows(4))
    for precision in ("no", "fp16"):
        guard = StepGuard(accelerator(DistributedType.DEEPSPEED, precision), arguments(tmp_path))
        guard.observe(torch.tensor(1.0), {}, {})
        if precision == "fp16":  # its own scaler leaves the step out
            assert guard.is_finite(math.inf, 0, never)
            guard.observe(torch.tensor(math.nan), {}, {})
        with pytest.raises(ValueError, match="after the backward pass moved the weights") as raised:
            guard.is_finite(math.inf, 0, never)
        assert "skip_nonfinite_steps" not in str(raised.value)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_training_that_diverges_is_not_saved(tmp_path, steps):
    """The weights of the last step have not been used in a forward, so that they are checked themselves."""
    model = make_mfn(make_base("llama-tied"), alpha=0.0)
    args = arguments(tmp_path, learning_rate=1e30, max_steps=steps, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="is not finite"):
        MFNTrainer(model, args, train_dataset=rows(64)).train()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "fine"),
    [
        (1.0, 2.0, None, True),
        (1.0, math.inf, None, False),
        (math.nan, 2.0, None, False),
        (1.0, math.inf, 2.0**16, True),  # float16: the scaler leaves the step out and lowers its scale
        (1.0, math.nan, 1.0, False),
        (math.inf, 2.0, 2.0**16, False),
    ],
)
def test_what_counts_as_a_step_that_is_not_finite(loss, norm, scale, fine):
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    guard = StepGuard(accelerator(scaler=scaler), arguments("unused", skip_nonfinite_steps=1))
    for _ in range(2):
        guard.observe(torch.tensor(1.0), {}, {0: {"recon": torch.tensor(1.0)}})
        guard.observe(torch.tensor(loss), {}, {0: {"recon": torch.tensor(loss)}})
        if fine:
            assert guard.is_finite(torch.tensor(norm), 6, never)
    if not fine:
        guard._losses = guard._losses[-2:]
        assert not guard.is_finite(torch.tensor(norm), 6, never)
        guard.observe(torch.tensor(loss), {}, {0: {"recon": torch.tensor(loss)}})
        with pytest.raises(ValueError, match="in step 8"):
            guard.is_finite(torch.tensor(norm), 7, lambda: nn.Linear(2, 2))

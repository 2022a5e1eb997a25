"""Cost of MFN layers: closed forms compared with independent counts. Nothing here depends on the clock."""

import math

import pytest
import torch
from conftest import HIDDEN, make_base, make_mfn, tokens
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.compute import compute_cost, flops_per_token, peak_memory


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gpt2-tied"])
def test_flops_are_those_that_torch_counts(name):
    """Torch counts all matrix products, including eager attention in full, but no gathered sums."""
    base, rows, length, m, k = make_base(name), 2, 10, 80, 8
    base.set_attn_implementation("eager")
    model = make_mfn(base, layers=[0, 2], num_features=m, k=k)
    counted = []
    for each in (base, model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            each(**tokens(rows, length), use_cache=False)
        counted.append(counter.get_total_flops() / (rows * length))
    # Llama's rotary embedding multiplies positions and frequencies once for all rows: half a head's width
    rotary = 2 * (HIDDEN // 4 // 2) / rows if "llama" in name else 0
    assert flops_per_token(base, length) == pytest.approx(counted[0] - rotary, rel=1e-3)
    gathered = 2 * 2 * k * HIDDEN
    assert flops_per_token(model, length) - flops_per_token(base, length) == counted[1] - counted[0] + gathered


def test_all_figures_of_both_models_which_stay_as_they_were(family_base):
    model = make_mfn(family_base, layers=[1], num_features=80).train()
    cost = compute_cost(model, family_base, tokens(2, 16)["input_ids"], rounds=1, new_tokens=3)
    assert set(cost) == {
        "parameters", "flops_per_token", "forward_tokens_per_second", "training_tokens_per_second",
        "generation_ms_per_token", "forward_memory_mib", "training_memory_mib",
    }  # fmt: skip
    assert cost["parameters"]["MFN"] - cost["parameters"]["base"] == 2 * 80 * HIDDEN + 80 + HIDDEN
    for name, of in cost.items():
        assert set(of) == {"base", "MFN", "ratio"}, name
        if "memory" not in name:
            assert of["ratio"] == pytest.approx(of["MFN"] / of["base"])
            assert of["base"] > 0
    assert (model.training, family_base.training, model.config.alpha) == (True, False, 1.0)
    assert all(parameter.grad is None for each in (model, family_base) for parameter in each.parameters())


@pytest.mark.parametrize("pieces", [1, 64])
def test_peak_memory_sees_what_is_gone_afterwards(pieces):
    """The peak is measured even if the C library keeps freed memory, as with small pieces."""

    def work():
        passing = [torch.ones(64 * 2**18 // pieces) for _ in range(pieces)]  # 64 MiB
        del passing

    found = [peak_memory(work, torch.device("cpu")) / 2**20 for _ in range(3)]
    assert all(math.isnan(peak) or 60 < peak < 100 for peak in found)

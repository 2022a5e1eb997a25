"""What MFN layers cost in time and memory: an MFN model beside its base (section 8 of the paper)."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modeling_mfn.model.mfn_layer import FeatureEncoder
from modeling_mfn.model.modeling_mfn import MFNForCausalLM

MIB = 2**20


def compute_cost(
    model: MFNForCausalLM, base: PreTrainedModel, input_ids: Tensor, *, rounds: int = 7, new_tokens: int = 32
) -> dict[str, dict[str, float]]:
    """Figure -> `{"base", "MFN", "ratio"}`, the last MFN / base. MFN layers compute the same at every alpha.

    - `parameters`;
    - `flops_per_token`: of a forward, see `flops_per_token`, with T tokens to attend to;
    - `forward_tokens_per_second`, `training_tokens_per_second`: of forwards, and of forward and backward of the
      next-token loss through all that requires a gradient, without an optimizer;
    - `generation_ms_per_token`: greedy, with a cache, one row, after a prompt of half of the first row;
    - `forward_memory_mib`, `training_memory_mib`: the most memory that this takes beyond what is there before, such as
      the weights: resident on a CPU under Linux (NaN elsewhere), allocated on a CUDA device.

    Times are medians over rounds in which the two take turns, after one that warms them up. Gradients that the models
    hold are lost.

    Args:
        model: an MFN model.
        base: its base model, on the same device and of the same precision.
        input_ids: (B, T) tokens, B T a forward.
        rounds: to take the median of.
        new_tokens: to generate.
    """
    models: dict[str, PreTrainedModel] = {"base": base, "MFN": model}
    prompt = input_ids[:1, : max(1, input_ids.shape[1] // 2)]

    def forward(each: Any) -> None:
        with torch.no_grad():
            each(input_ids=input_ids, use_cache=False)

    def train(each: Any) -> None:
        each(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        each.zero_grad(set_to_none=True)

    def generate(each: Any) -> None:
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        mask = torch.ones_like(prompt)
        each.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, use_cache=True, **length)

    figures: dict[str, dict[str, float]] = {
        "parameters": {name: float(each.num_parameters()) for name, each in models.items()},
        "flops_per_token": {name: float(flops_per_token(each, input_ids.shape[1])) for name, each in models.items()},
    }
    with _evaluating(models):
        for name, work in (("forward", forward), ("training", train)):
            seconds = interleaved(models, work, rounds)
            figures[f"{name}_tokens_per_second"] = {who: input_ids.numel() / time for who, time in seconds.items()}
            figures[f"{name}_memory_mib"] = {
                who: peak_memory(lambda: work(each), each.device) / MIB  # noqa: B023
                for who, each in models.items()
            }
        seconds = interleaved(models, generate, rounds)
        figures["generation_ms_per_token"] = {who: 1000 * time / new_tokens for who, time in seconds.items()}
    return {
        name: of | {"ratio": of["MFN"] / of["base"] if of["base"] else float("nan")} for name, of in figures.items()
    }


def flops_per_token(model: PreTrainedModel, context: int) -> int:
    """Floating-point operations of the matrix products in one token's forward, 2 for each multiply and add.

    Every weight of a projection and of the LM head counts once; attention twice for each of `context` positions, its
    scores and its values; an MFN layer's encoder m d, its decoder, which gathers, K d. The rest is small beside it.
    """
    config = model.config
    width = config.num_attention_heads * (
        getattr(config.get_text_config(), "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    products = 2 * config.num_hidden_layers * context * width
    products += sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D | FeatureEncoder))
    if isinstance(model, MFNForCausalLM):
        products += len(model.mfn_layers) * config.k * config.hidden_size
    return 2 * products


def interleaved(models: dict[str, Any], work: Callable[[Any], None], rounds: int) -> dict[str, float]:
    """Median seconds of some work for each of several models, which take turns: what else a machine does meanwhile
    touches all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            _wait(model.device)
            begun = time.perf_counter()
            work(model)
            _wait(model.device)
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def peak_memory(work: Callable[[], None], device: torch.device) -> float:
    """The most bytes that some work takes beyond what there was before it; NaN where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return float(torch.cuda.max_memory_allocated(device) - before)
    _return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    except OSError:
        return math.nan
    before = _resident("VmHWM")
    work()
    return float(_resident("VmHWM") - before)


def _return_freed_memory() -> None:
    """Gives the system back what the C library keeps of freed memory, which work could use again unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(value)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _evaluating(models: dict[str, PreTrainedModel]) -> Iterator[None]:
    training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    try:
        yield
    finally:
        for name, model in models.items():
            model.train(training[name])


__all__ = ["compute_cost", "flops_per_token", "interleaved", "peak_memory"]

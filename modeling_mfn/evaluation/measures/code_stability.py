"""Stability of codes (section 7 of the paper): how much of a token's code stays when its input or context changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...data.windows import input_batches
from ...model.mfn_pass import ReconstructionRequest
from ...model.modes import evaluating
from ...training.objective import Perturbation
from ..intervals import Estimate, mean
from ..result import Subjects

if TYPE_CHECKING:
    from ...model.mfn_for_causal_lm import MFNForCausalLM
    from ...model.sparse_code import SparseCode

UNRELATED, CUT, REPLACED = "another token", "context cut off", "context replaced"
AGREEMENT = ("Jaccard index", "cosine", "mass kept")
"""Names of the measures of [`agreement`]."""

Agreements = dict[str, dict[int, dict[str, np.ndarray]]]
"""Perturbation -> layer -> name of a measure -> (W,), the mean over the tokens of each window."""


@dataclass(frozen=True)
class CodeStability:
    """Agreement of codes before and after each perturbation."""

    figures: dict[str, dict[str, dict[str, Estimate]]]
    """Subject -> perturbation -> name of a measure -> estimate, averaged over layers and seeds."""
    by_layer: dict[str, dict[str, dict[int, dict[str, Estimate]]]]
    """Subject -> perturbation -> layer -> name of a measure -> estimate, averaged over seeds."""


def code_stability(
    subjects: Subjects,
    windows: Sequence[Mapping[str, Any]],
    *,
    strengths: Sequence[float] = (0.1, 0.3),
    batch_size: int = 8,
    seed: int = 0,
) -> CodeStability:
    """Perturbs all subjects in the same ways and compares their codes. Intervals are Student's t over windows.

    - `noise 0.1 on h`: Gaussian noise at the input of an MFN layer, with this share of the token's RMS. The stability
      loss has the same noise (eq. 8, `stability_pass="layer"`).
    - `noise 0.1 on embeddings`: noise on the embeddings, which passes through the whole model (training note of
      section 4.4).
    - `context cut off`: the first half of a window is taken away; the other tokens keep their positions.
    - `context replaced`: the first half of the next window is in its place. Both measure tokens of the second half.
    - `another token`: the code of another, random token of the window, without any perturbation. It shows what codes
      have in common in any case.

    Args:
        subjects: MFN models of any kind.
        windows: at least two, of equal length: rows with `input_ids` (T,), and `attention_mask` (T,) where they are
            padded at the end.
        strengths: strengths of the noise, as shares of the RMS.
        batch_size: windows per forward.
        seed: seed of the noise and of the other tokens.

    Raises:
        ValueError: if there are fewer than two windows, or windows have fewer than two tokens.
    """
    measured = {
        name: [
            measure_stability(model, windows, strengths=strengths, batch_size=batch_size, seed=seed) for model in models
        ]
        for name, models in subjects.items()
        if models
    }
    return CodeStability(
        {
            name: {kind: _estimates([layer for seed in seeds for layer in seed[kind].values()]) for kind in seeds[0]}
            for name, seeds in measured.items()
        },
        {
            name: {
                kind: {layer: _estimates([seed[kind][layer] for seed in seeds]) for layer in layers}
                for kind, layers in seeds[0].items()
            }
            for name, seeds in measured.items()
        },
    )


def measure_stability(
    model: MFNForCausalLM,
    windows: Sequence[Mapping[str, Any]],
    *,
    strengths: Sequence[float] = (0.1, 0.3),
    batch_size: int = 8,
    seed: int = 0,
) -> Agreements:
    """Measures one model window by window, with NaN where no token counts.

    The arguments are those of [`code_stability`]. The random state of torch stays as it was.
    """
    length = len(windows[0]["input_ids"]) if len(windows) else 0
    if len(windows) < 2 or length < 2:
        raise ValueError(f"there are {len(windows)} windows of {length} tokens; give at least 2 of at least 2")
    found: dict[str, dict[int, dict[str, list[np.ndarray]]]] = {}
    others = [windows[(row + 1) % len(windows)] for row in range(len(windows))]
    pairs = zip(input_batches(windows, batch_size), input_batches(others, batch_size), strict=True)
    devices = [model.device] if model.device.type != "cpu" else []
    with evaluating(model), torch.random.fork_rng(devices, device_type=model.device.type), torch.no_grad():
        torch.manual_seed(seed)
        for batch, other in tqdm(pairs, "stability of codes", -(-len(windows) // batch_size), leave=False):
            inputs, partners = ({n: t.to(model.device) for n, t in each.items()} for each in (batch, other))
            for kind, layer, code, perturbed, counted in _perturbed(model, inputs, partners, strengths):
                of_layer = found.setdefault(kind, {}).setdefault(layer, {name: [] for name in AGREEMENT})
                for name, values in agreement(code, perturbed).items():
                    of_layer[name].append(_mean_of_rows(values, counted))
    return {
        kind: {layer: {name: np.concatenate(parts) for name, parts in each.items()} for layer, each in layers.items()}
        for kind, layers in found.items()
    }


def agreement(code: SparseCode, perturbed: SparseCode) -> dict[str, Tensor]:
    """Compares two codes of a token, (..., K) and (..., K').

    - `Jaccard index`: |A and B| / |A or B| of the sets of active features;
    - `cosine` of the codes;
    - `mass kept`: share of the code's sum of activations that belongs to features active in the perturbed code, too.

    Returns:
        (...,) each. NaN where the code has no active feature, 0 where the perturbed code has none.
    """
    z, other = code.values.float(), perturbed.values.float()
    both = (z > 0).unsqueeze(-1) & (other > 0).unsqueeze(-2)
    same = both & (code.indices.unsqueeze(-1) == perturbed.indices.unsqueeze(-2))
    shared = same.sum((-1, -2))
    product = (z.unsqueeze(-1) * other.unsqueeze(-2) * same).sum((-1, -2))
    norms = z.norm(dim=-1) * other.norm(dim=-1)
    found = {
        "Jaccard index": shared / ((z > 0).sum(-1) + (other > 0).sum(-1) - shared),
        "cosine": product / norms.clamp_min(torch.finfo(norms.dtype).tiny),
        "mass kept": (z * same.any(-1)).sum(-1) / z.sum(-1),
    }
    return {name: values.masked_fill(z.sum(-1) == 0, torch.nan) for name, values in found.items()}


Compared = tuple[str, int, "SparseCode", "SparseCode", Tensor]
"""Perturbation, layer, code (B, T, K), perturbed code, and (B, T) bool which tokens count."""


def _perturbed(
    model: MFNForCausalLM,
    inputs: dict[str, Tensor],
    partners: dict[str, Tensor],
    strengths: Sequence[float],
) -> Iterator[Compared]:
    """Yields each perturbation at each layer."""
    counted = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    clean = model.model(**inputs, output_reconstructions=True, use_cache=False).reconstructions
    codes = {layer: item.code for layer, item in clean.items()}
    places = _other_tokens(counted)
    for layer, code in codes.items():
        yield UNRELATED, layer, code, _take(code, places), counted
        for strength in strengths:
            h = Perturbation("noise", strength)(clean[layer].residual)
            yield f"noise {strength:g} on h", layer, code, model.mfn_layers[layer].encode(h), counted
    for strength in strengths:
        request = ReconstructionRequest(perturb_embeddings=Perturbation("noise", strength))
        found = model.model(**inputs, output_codes=True, reconstruction_request=request, use_cache=False).codes
        for layer, code in codes.items():
            yield f"noise {strength:g} on embeddings", layer, code, found[layer], counted
    yield from _changed_contexts(model, inputs, partners, codes, counted)


def _changed_contexts(
    model: MFNForCausalLM,
    inputs: dict[str, Tensor],
    partners: dict[str, Tensor],
    codes: dict[int, SparseCode],
    counted: Tensor,
) -> Iterator[Compared]:
    """Yields the codes of second halves of windows after other first halves, or none."""
    length = counted.shape[1]
    half = length // 2
    positions = torch.arange(half, length, device=counted.device).expand(len(counted), -1)
    cut = {name: tensor[:, half:] for name, tensor in inputs.items()}
    replaced = {name: torch.cat([partners[name][:, :half], tensor], 1) for name, tensor in cut.items()}
    for kind, changed in ((CUT, {"position_ids": positions} | cut), (REPLACED, replaced)):
        found = model.model(**changed, output_codes=True, use_cache=False).codes
        for layer, code in codes.items():
            yield kind, layer, _last(code, length - half), _last(found[layer], length - half), counted[:, half:]


def _other_tokens(counted: Tensor) -> Tensor:
    """(B, T) position of another token of the row that counts: the next one in a random circle through all of them."""
    score = torch.rand(counted.shape, device=counted.device).masked_fill(~counted, torch.inf)
    order = score.argsort(dim=1)  # tokens that count come first
    number = counted.sum(1, keepdim=True).clamp_min(1)
    following = (torch.arange(counted.shape[1], device=counted.device) + 1) % number
    return torch.empty_like(order).scatter_(1, order, order.gather(1, following))


def _take(code: SparseCode, places: Tensor) -> SparseCode:
    places = places.unsqueeze(-1).expand_as(code.indices)
    return code._replace(indices=code.indices.gather(1, places), values=code.values.gather(1, places))


def _last(code: SparseCode, tokens: int) -> SparseCode:
    return code._replace(indices=code.indices[:, -tokens:], values=code.values[:, -tokens:])


def _mean_of_rows(values: Tensor, counted: Tensor) -> np.ndarray:
    return values.masked_fill(~counted, torch.nan).nanmean(1).double().cpu().numpy()


def _estimates(measured: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Estimate]:
    """Estimates over windows of the averages over layers and seeds."""
    return {name: mean(np.mean([each[name] for each in measured], axis=0)) for name in AGREEMENT}


__all__ = ["CodeStability", "agreement", "code_stability", "measure_stability"]

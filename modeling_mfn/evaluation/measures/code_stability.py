"""Stability of codes (section 7): what stays of a token's code when its input or its context changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...data.windows import input_batches
from ...model.mfn_pass import ReconstructionRequest
from ...model.modeling_mfn import MFNForCausalLM
from ...model.modes import evaluating
from ...model.sparse_code import SparseCode
from ...training.objective import Perturbation
from ..intervals import Estimate, mean
from ..result import Subjects

UNRELATED, CUT, REPLACED = "another token", "context cut off", "context replaced"
AGREEMENT = ("Jaccard index", "cosine", "mass kept")

Agreements = dict[str, dict[int, dict[str, np.ndarray]]]
"""Perturbation -> layer -> figure -> (W,), the mean over a window's tokens."""


@dataclass(frozen=True)
class CodeStability:
    """How much of the codes stays."""

    figures: dict[str, dict[str, dict[str, Estimate]]]
    """Subject -> perturbation -> figure of `agreement`, averaged over layers and seeds."""
    by_layer: dict[str, dict[str, dict[int, dict[str, Estimate]]]]
    """The same by layer."""


def code_stability(
    subjects: Subjects,
    windows: Sequence[Mapping[str, Any]],
    *,
    strengths: Sequence[float] = (0.1, 0.3),
    batch_size: int = 8,
    seed: int = 0,
) -> CodeStability:
    """What stays of the codes of all subjects when something changes; intervals are Student's t, over windows.

    Perturbations, of which each model meets the same:

    - `noise 0.1 on h`: Gaussian noise at an MFN layer's input, of this share of the token's RMS, as the stability
      loss has it (eq. 8, `stability_pass="layer"`); and other strengths;
    - `noise 0.1 on embeddings`: the same on the embeddings, through the whole model (section 4.4's training note);
    - `context cut off`: the first half of a window taken away, the other tokens at the positions that they had;
      `context replaced`: the first half of the next window in its place. Figures are of the second half's tokens;
    - `another token`: nothing perturbed, but the codes of other tokens of the window, at random: what codes have in
      common in any case.

    Args:
        subjects: MFN models of any kind.
        windows: at least two, of equal length: rows with `input_ids` (T,), and `attention_mask` (T,) where they are
            padded at their end.
        strengths: of the noise, as a share of the RMS.
        batch_size: windows a forward.
        seed: of the noise, and of other tokens.

    Raises:
        ValueError: if there are fewer than two windows, or of fewer than two tokens.
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
            name: {kind: _figures([layer for seed in seeds for layer in seed[kind].values()]) for kind in seeds[0]}
            for name, seeds in measured.items()
        },
        {
            name: {
                kind: {layer: _figures([seed[kind][layer] for seed in seeds]) for layer in layers}
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
    """One model's figures, window by window, NaN where no token counts; see `code_stability`. Its random state, and
    torch's, stay as they were."""
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
    """What two codes of a token have in common, (..., K) and (..., K') -> (...):

    - `Jaccard index` |A and B| / |A or B| of the sets of active features;
    - `cosine` of the codes;
    - `mass kept`: share of the code's sum of activations that is of features active in the perturbed one, too.

    NaN where no feature is active in the code; 0 where none is in the perturbed one.
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


Compared = tuple[str, int, SparseCode, SparseCode, Tensor]
"""Perturbation, layer, the code (B, T, K) and the perturbed one, and which tokens (B, T) count."""


def _perturbed(
    model: MFNForCausalLM,
    inputs: dict[str, Tensor],
    partners: dict[str, Tensor],
    strengths: Sequence[float],
) -> Iterator[Compared]:
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
    """(B, T) places of other tokens of the row that count: the next one in a random circle through them."""
    score = torch.rand(counted.shape, device=counted.device).masked_fill(~counted, 2)
    order = score.argsort(dim=1)  # those that count first
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


def _figures(measured: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Estimate]:
    """Averaged over layers and seeds, of windows."""
    return {name: mean(np.mean([each[name] for each in measured], axis=0)) for name in AGREEMENT}


__all__ = ["CodeStability", "agreement", "code_stability", "measure_stability"]

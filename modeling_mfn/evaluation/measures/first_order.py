"""How well the derivative along an intervention predicts what it does: figures of one intervention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from .intervention_effects import Output, Response

TOP = 20
"""Tokens looked at as those that an intervention moves most."""


def response_figures(
    response: Response, changes: np.ndarray, baseline: Tensor, outputs: Sequence[Output]
) -> dict[str, np.ndarray]:
    """Figures at each change (S,), or (1,) where all of them make one. They are at the intervention's token, unless
    they say otherwise.

    - `correlation of logits`: Pearson's, over the vocabulary, of predicted and real change;
    - `correlation of later logits`: over the vocabulary and the L later tokens;
    - `correlation of attention`: over all L + 1 tokens and a head's entries before the output projection, averaged over
      the heads of `outputs`; `correlation of MLP`: over these tokens and the entries of an MLP's output, averaged over
      MLPs. NaN where `outputs` has none;
    - `relative error`: |real - predicted| / |real| of the logits' changes;
    - `sign agreement`: of the 20 tokens whose logits really change most, the share that was predicted to move this way;
    - `KL`: in nats, to the next-token distribution with the intervention from that without;
    - `later KL`: its mean over later tokens, as a share of that at the token itself;
    - `unpredicted tokens`: the share of all real change of next-token probabilities that falls on tokens other than the
      20 whose probabilities were predicted to change most;
    - `replaced features`: of those active at the token in later MFN layers, the share that no longer is;
    - `dose response`: Spearman's correlation, over the changes with 0 among them, of predicted and real change of the
      logit that has the largest derivative; `linearity`: R2 of the line that fits it best.

    Args:
        response: with logits that are centred over the vocabulary.
        changes: (S,) as given to make the response.
        baseline: (L + 1, V) logits without intervention.
        outputs: heads and MLPs to look at.
    """
    sizes = torch.as_tensor(changes, dtype=baseline.dtype, device=baseline.device)
    slope, real = response.derivative["logits"], response.changes["logits"]
    predicted = _times(sizes, slope)
    divergence = _divergence(baseline, real)
    found = {
        "correlation of logits": _correlation(predicted[:, 0], real[:, 0]),
        "correlation of later logits": _correlation(predicted[:, 1:].flatten(1), real[:, 1:].flatten(1)),
        "correlation of attention": _heads(response, sizes, [each for each in outputs if each[0] == "attention"]),
        "correlation of MLP": _mlps(response, sizes, [each for each in outputs if each[0] == "MLP"]),
        "relative error": (real - predicted)[:, 0].norm(dim=-1) / real[:, 0].norm(dim=-1),
        "sign agreement": _sign_agreement(predicted[:, 0], real[:, 0]),
        "KL": divergence[:, 0],
        "later KL": divergence[:, 1:].mean(-1) / divergence[:, 0],
        "unpredicted tokens": _unpredicted(baseline[0], slope[0], real[:, 0]),
        "replaced features": response.replaced,
    }
    arrays = {name: values.double().cpu().numpy() for name, values in found.items()}
    return arrays | _dose_response(changes, slope[0].cpu().numpy(), real[:, 0].cpu().numpy())


def _times(sizes: Tensor, slope: Tensor) -> Tensor:
    """(S,) and (...) -> (S, ...)."""
    return sizes.view(-1, *[1] * slope.ndim) * slope


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's over the last dimension; NaN where one does not vary."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def _heads(response: Response, sizes: Tensor, outputs: Sequence[Output]) -> Tensor:
    by_block = []
    for output in outputs:
        predicted, real = (
            each.transpose(1, 2).flatten(2)
            for each in (_times(sizes, response.derivative[output]), response.changes[output])
        )
        by_block.append(_correlation(predicted, real))
    return torch.cat(by_block, -1).nanmean(-1) if by_block else torch.full_like(sizes, torch.nan)


def _mlps(response: Response, sizes: Tensor, outputs: Sequence[Output]) -> Tensor:
    by_block = [
        _correlation(_times(sizes, response.derivative[output]).flatten(1), response.changes[output].flatten(1))
        for output in outputs
    ]
    return torch.stack(by_block).nanmean(0) if by_block else torch.full_like(sizes, torch.nan)


def _sign_agreement(predicted: Tensor, real: Tensor) -> Tensor:
    most = real.abs().topk(min(TOP, real.shape[-1]), dim=-1).indices
    return (predicted.gather(-1, most).sign() == real.gather(-1, most).sign()).double().mean(-1)


def _divergence(baseline: Tensor, change: Tensor) -> Tensor:
    """KL(without | with), (S, L + 1)."""
    before, after = baseline.log_softmax(-1), (baseline + change).log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1)


def _unpredicted(baseline: Tensor, slope: Tensor, change: Tensor) -> Tensor:
    before = baseline.softmax(-1)
    expected = before * (slope - before @ slope)
    most = expected.abs().topk(min(TOP, len(expected))).indices
    moved = ((baseline + change).softmax(-1) - before).abs()
    return 1 - moved[:, most].sum(-1) / moved.sum(-1)


def _dose_response(changes: np.ndarray, slope: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    token = np.abs(slope).argmax()
    dose, answer = np.append(changes, 0.0), np.append(real[:, token], 0.0)
    if np.ptp(answer) == 0:
        return {"dose response": np.array([np.nan]), "linearity": np.array([np.nan])}
    rank = stats.spearmanr(dose * slope[token], answer).statistic
    return {"dose response": np.array([rank]), "linearity": np.array([np.corrcoef(dose, answer)[0, 1] ** 2])}


__all__ = ["response_figures"]

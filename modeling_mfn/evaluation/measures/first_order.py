"""Agreement of the first-order prediction of an intervention, its derivative, with its real effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...utils.extras import needs
from .intervention_effects import Bench, Output, Push, Response, Site, exact_copy, readers

if TYPE_CHECKING:
    from ...model.mfn_for_causal_lm import MFNForCausalLM

STRENGTHS = (0.0, 0.5, 1.5, 2.0, 4.0)
"""Multiples of a feature's activation that it is set to. 0 ablates it."""
TOP_TOKENS = 20
"""Number of tokens that count as those an intervention moves most."""
FEATURE, RANDOM_DIRECTION, ADDED = "feature", "random direction", "inactive feature"
"""Kinds of interventions."""

Measured = dict[str, dict[str, np.ndarray]]
"""Kind of intervention -> measure -> (sites, layers, S), or (sites, layers, 1) for measures over all strengths."""


def measure_interventions(
    model: MFNForCausalLM,
    sites: Sequence[Site],
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    description: str = "interventions",
) -> Measured:
    """Intervenes at each site on a random active feature of each layer and compares with the derivative.

    The model runs at alpha = 1 and in float64. Measures are those of [`response_measures`], NaN where a layer has no
    active feature. There are three kinds of interventions:

    - `feature`: its activation a is set to strength * a;
    - `random direction`: the residual stream moves by the same length along a random direction;
    - `inactive feature`: a feature that is active on an earlier token but not at the site is raised by the same amount,
      at strengths above 1.

    Args:
        model: MFN model, which is not changed.
        sites: tokens at which to intervene.
        strengths: multiples of the activation, without 1.
        seed: seed of the choice of features and directions.
        description: label of the progress bar.
    """
    twin = exact_copy(model)
    layers = twin.config.layers
    found: Measured = {}
    for place, site in enumerate(tqdm(sites, description, leave=False)):
        bench = Bench(twin, site)
        for row, layer in enumerate(layers):
            random = np.random.default_rng((seed, place, layer))
            for kind, changes, response in _interventions(bench, layer, np.array(strengths) - 1, random):
                baseline = bench.baseline["logits"][0]
                for name, values in response_measures(response, changes, baseline, readers(twin, layer)).items():
                    shape = (len(sites), len(layers), len(values))
                    array = found.setdefault(kind, {}).setdefault(name, np.full(shape, np.nan))
                    array[place, row] = values
    return found


def _interventions(
    bench: Bench, layer: int, changes: np.ndarray, random: np.random.Generator
) -> Iterator[tuple[str, np.ndarray, Response]]:
    """Yields kind, changes and response of each intervention at one layer."""
    active = bench.activations(layer)
    if not active:
        return
    feature = int(random.choice(list(active)))
    direction = torch.from_numpy(random.standard_normal(bench.model.config.hidden_size))
    pushes = [Push(feature), Push(feature, direction / direction.norm())]
    both = bench.responses(layer, pushes, active[feature], changes)
    yield from ((kind, changes, response) for kind, response in zip((FEATURE, RANDOM_DIRECTION), both, strict=True))
    up, others = changes[changes > 0], bench.seen_before(layer)
    if len(up) and others:
        (response,) = bench.responses(layer, [Push(int(random.choice(others)))], active[feature], up)
        yield ADDED, up, response


def response_measures(
    response: Response, changes: np.ndarray, baseline: Tensor, outputs: Sequence[Output]
) -> dict[str, np.ndarray]:
    """Compares predicted and real changes of one intervention, at its own token unless a measure says otherwise.

    - `correlation of logits`: Pearson's correlation of predicted and real change over the vocabulary;
    - `correlation of later logits`: over the vocabulary and the L later tokens;
    - `correlation of attention`: over all L + 1 tokens and the entries of a head before the output projection, averaged
      over the heads of `outputs`. NaN where `outputs` has none;
    - `correlation of MLP`: over all L + 1 tokens and the entries of an MLP's output, averaged over the MLPs of
      `outputs`. NaN where `outputs` has none;
    - `relative error`: |real - predicted| / |real| of the changes of logits;
    - `sign agreement`: share of the 20 tokens with the largest real change of logits that was predicted to move in the
      same direction;
    - `KL`: KL(without || with) of the next-token distributions without and with the intervention, in nats;
    - `later KL`: its mean over later tokens, as a share of the KL at the token itself;
    - `unpredicted tokens`: share of the real change of next-token probabilities on tokens other than the 20 with the
      largest predicted change;
    - `replaced features`: share of the features active at the token in later MFN layers that no longer are;
    - `dose response`: Spearman's correlation of predicted and real change over the changes and 0, for the logit with
      the largest derivative. `linearity` is R2 of the best line through these points.

    Args:
        response: response with logits that are centred over the vocabulary.
        changes: (S,) changes that the response was made with.
        baseline: (L + 1, V) logits without intervention.
        outputs: heads and MLPs to compare.

    Returns:
        (S,) each, or (1,) for the two measures over all changes.
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
    """(S, ...) product of each size (S,) with the slope (...)."""
    return sizes.view(-1, *[1] * slope.ndim) * slope


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation over the last dimension, NaN where one of the two does not vary."""
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
    most = real.abs().topk(min(TOP_TOKENS, real.shape[-1]), dim=-1).indices
    return (predicted.gather(-1, most).sign() == real.gather(-1, most).sign()).double().mean(-1)


def _divergence(baseline: Tensor, change: Tensor) -> Tensor:
    """(S, L + 1) KL(without || with)."""
    before, after = baseline.log_softmax(-1), (baseline + change).log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1)


def _unpredicted(baseline: Tensor, slope: Tensor, change: Tensor) -> Tensor:
    before = baseline.softmax(-1)
    expected = before * (slope - before @ slope)
    most = expected.abs().topk(min(TOP_TOKENS, len(expected))).indices
    moved = ((baseline + change).softmax(-1) - before).abs()
    return 1 - moved[:, most].sum(-1) / moved.sum(-1)


def _dose_response(changes: np.ndarray, slope: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    token = np.abs(slope).argmax()
    dose, answer = np.append(changes, 0.0), np.append(real[:, token], 0.0)
    if np.ptp(answer) == 0:
        return {"dose response": np.array([np.nan]), "linearity": np.array([np.nan])}
    with needs("evaluate"):
        from scipy.stats import spearmanr
    rank = spearmanr(dose * slope[token], answer).statistic
    return {"dose response": np.array([rank]), "linearity": np.array([np.corrcoef(dose, answer)[0, 1] ** 2])}


__all__ = [
    "ADDED",
    "FEATURE",
    "RANDOM_DIRECTION",
    "STRENGTHS",
    "Measured",
    "measure_interventions",
    "response_measures",
]

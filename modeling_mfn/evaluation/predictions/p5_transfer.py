"""P5: what features that were learnt on one domain are worth on others.

Everything is measured through features alone (alpha = 1), against a dense model of the same training, so that what such
a training forgets of other domains is charged to nobody's features. A post-hoc SAE's dense model is its base. The
backbone of an MFN model that was trained with its features is another one; what it loses by itself stands beside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from ...data.windows import Windows
from ...model.modeling_mfn import MFNForCausalLM
from ...model.modes import at_alpha
from ..intervals import CONFIDENCE, Estimate, less_by_seed, mean
from ..measures.perplexity import reconstruction_errors, window_losses
from ..result import MFN, POST_HOC_SAE, Outcome, PaperCriterion, PredictionResult

FINE_TUNED_SAE = "fine-tuned SAE"
LIMIT = 0.05
CLAIM = "Features transfer better across domains than those of post-hoc SAEs"
PAPER_CRITERION = "At most 5 % perplexity loss across domains; baseline: a fine-tuned SAE."
CRITERION = (
    "Perplexity through features learnt on one domain is, on the others, (a) at most 5 % above that of the dense model "
    "of the same training; this loss is below that (b) of a post-hoc SAE spliced into the base and (c) of the same SAE "
    "fine-tuned on each of the others; and (d) its excess over the loss on the source, (1 + loss on the others) / (1 + "
    "loss on the source) - 1, is below that of the SAE that was not fine-tuned: what is lost everywhere says nothing "
    "of transfer. Confirmed: all four, each with its whole interval and in every seed. Partly: (d), and (a) or (b), "
    "in the same sense. Intervals are from resampling windows of text."
)
HEADLINE, EXCESS = "perplexity_loss_targets", "excess_gap"

Probes = Callable[[MFNForCausalLM, str], Mapping[str, Sequence[float]]]
"""(model, source) -> domain -> AUROC of each concept: of probes on the model's codes that were fitted on text of the
source, on held-out text of the domain. Concepts are the same in all calls, NaN where there is too little text."""


@dataclass(frozen=True)
class Transfer:
    """Features of one training, which has a seed and a source."""

    source: str
    """The one domain that they were learnt from."""
    model: MFNForCausalLM
    reference: PreTrainedModel | None = None
    """What the perplexity through features is held against: for an MFN model its base model after a dense training on
    the same tokens. By default the model at alpha = 0, which is right where the backbone was frozen."""
    tuned: Mapping[str, MFNForCausalLM] = field(default_factory=dict)
    """Domain -> the model that was fine-tuned on it and takes the place of `model` there."""

    def on(self, domain: str) -> MFNForCausalLM:
        """The model that is measured on a domain."""
        return self.tuned.get(domain, self.model)


class Measured(NamedTuple):
    """A training on N windows of one domain."""

    losses: np.ndarray
    """(N,) nats a token, through features alone."""
    around: np.ndarray
    """(N,) nats a token, with nothing read through features (alpha = 0)."""
    reference: np.ndarray
    """(N,) nats a token, of the dense model."""
    errors: np.ndarray
    """(N, L), see `reconstruction_errors`."""
    distances: np.ndarray
    """(N, L), see there."""


def transfer_gap(
    subjects: Mapping[str, Sequence[Transfer]],
    windows: Mapping[str, Windows],
    *,
    probes: Probes | None = None,
    concepts: Sequence[tuple[str, str]] = (),
    batch_size: int = 8,
    resamples: int = 1000,
    seed: int = 0,
) -> PredictionResult:
    """P5, from held-out text of several domains.

    Figures are means over a subject's trainings, and over targets, which are all domains but a training's source.

    - `perplexity_loss_source`, `perplexity_loss_targets`: perplexity through features / that of the reference - 1;
    - `transfer_gap`: the second less the first; `excess_gap`: (1 + the second) / (1 + the first) - 1, which does not
      favour who loses much already on the source;
    - `backbone_loss_source`, `backbone_loss_targets`: perplexity at alpha = 0 / that of the reference - 1: the part of
      the loss that is the backbone's, as far as one that has learnt to read features can tell without them;
    - `perplexity_targets`, `reference_perplexity_targets`: what a loss is relative to, as geometric means;
    - `explained_variance_source`, `explained_variance_targets`: of what the encoders read at the model's own alpha, a
      mean over layers;
    - `probe_auroc_source`, `probe_auroc_targets`, `probe_auroc_gap`: with probes, means over the concepts that were
      measured everywhere, each group of which counts alike; the gap is the first less the second.

    Intervals are from resampling the windows of each domain, the same ones for all models, so that differences are
    paired; those of probes are Student's t, over concepts. What differs from seed to seed is in
    `details["by_domain"]`, and the concepts of probes in `details["probed"]`.

    Args:
        subjects: name -> trainings, one for each seed and source. The verdict needs `MFN`, `POST_HOC_SAE` and
            `FINE_TUNED_SAE`; others are measured beside.
        windows: domain -> held-out windows.
        probes: how to tell that probes carry over.
        concepts: (group, name) of each concept that `probes` has.
        batch_size: windows a forward.
        resamples: number of them.
        seed: of the resampling.

    Raises:
        ValueError: if there are fewer than two domains, a training names one that is not there, or concepts are not
            those of probes.
    """
    texts = {domain: list(rows) for domain, rows in windows.items()}
    _check(subjects, texts)
    weights = _resampled({domain: len(rows) for domain, rows in texts.items()}, resamples, seed)
    measure = _Measure(texts, batch_size)
    draws: dict[str, dict[str, np.ndarray]] = {}
    figures: dict[str, dict[str, Estimate]] = {}
    by_domain: dict[str, list[dict[str, Any]]] = {}
    by_seed: dict[str, dict[str, list[float]]] = {}
    for name, transfers in subjects.items():
        found = [{domain: _draws(measure(each, domain), weights[domain]) for domain in texts} for each in transfers]
        of_trainings = [_of_training(each.source, of) for each, of in zip(transfers, found, strict=True)]
        draws[name] = {figure: np.mean([of[figure] for of in of_trainings], 0) for figure in of_trainings[0]}
        by_seed[name] = {figure: [float(of[figure][0]) for of in of_trainings] for figure in (HEADLINE, EXCESS)}
        figures[name] = {figure: _figure(values) for figure, values in draws[name].items()}
        by_domain[name] = [
            {"source": each.source} | {domain: {n: _figure(v) for n, v in of[domain].items()} for domain in texts}
            for each, of in zip(transfers, found, strict=True)
        ]
    probed: dict[str, list[str]] = {}
    if probes is not None and subjects:
        probes = cache(probes)  # a model and a source are asked for once a target
        areas = {name: _probe_areas(transfers, list(texts), probes) for name, transfers in subjects.items()}
        if (given := next(iter(areas.values())).shape[-1]) != len(concepts):
            raise ValueError(f"probes have {given} areas, and concepts are {len(concepts)}; give one for each")
        known = ~np.isnan(np.concatenate([*areas.values()])).any((0, 1))
        kept = [concept for concept, is_known in zip(concepts, known, strict=True) if is_known]
        for group, concept in kept:
            probed.setdefault(group, []).append(concept)
        for name, of in areas.items():
            figures[name] |= _probe_figures(of[..., known], [group for group, _ in kept])
    less = {
        name: {figure: _figure(draws[MFN][figure] - draws[name][figure]) for figure in (HEADLINE, EXCESS)}
        for name in (POST_HOC_SAE, FINE_TUNED_SAE)
        if MFN in draws and name in draws
    }
    outcome, reason = _verdict(figures, less, by_seed)
    details = {"by_domain": by_domain, "by_seed": by_seed, "mfn_less_baseline": less, "probed": probed}
    paper = PaperCriterion.judged(PAPER_CRITERION, figures, HEADLINE, lambda loss: loss <= LIMIT, FINE_TUNED_SAE)
    return PredictionResult("P5", CLAIM, CRITERION, outcome, reason, HEADLINE, figures, FINE_TUNED_SAE, paper, details)


class _Measure:
    """Runs each model on each domain once, however many trainings share it."""

    def __init__(self, windows: Mapping[str, Windows], batch_size: int) -> None:
        self._windows, self._batch_size = windows, batch_size
        self._losses, self._errors = cache(self._run), cache(self._reconstruct)

    def __call__(self, transfer: Transfer, domain: str) -> Measured:
        model, reference = transfer.on(domain), transfer.reference
        around = self._losses(model, 0.0, domain)
        dense = around if reference is None else self._losses(reference, None, domain)
        return Measured(self._losses(model, 1.0, domain), around, dense, *self._errors(model, domain))

    def _run(self, model: Any, alpha: float | None, domain: str) -> np.ndarray:
        with nullcontext() if alpha is None else at_alpha(model, alpha):
            return window_losses(model, self._windows[domain], self._batch_size, f"loss on {domain}")

    def _reconstruct(self, model: MFNForCausalLM, domain: str) -> tuple[np.ndarray, np.ndarray]:
        return reconstruction_errors(model, self._windows[domain], self._batch_size)


def _resampled(counts: Mapping[str, int], resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Domain -> (1 + R, N) weights of its windows, each row of sum 1: equal ones, then those of R samples with
    replacement, NaN where there is one window alone. Their product with figures of windows is a mean, and its
    bootstrap."""
    generator = np.random.default_rng(seed)
    weights = {}
    for domain, n in counts.items():
        samples = generator.multinomial(n, np.full(n, 1 / n), resamples) if n > 1 else np.full((resamples, n), np.nan)
        weights[domain] = np.concatenate([np.ones((1, n)), samples]) / n
    return weights


def _draws(measured: Measured, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> (1 + R,): its value, and that of each resample."""
    losses, around, reference, errors, distances = (weights @ part for part in measured)
    return {
        "perplexity": np.exp(losses),
        "reference_perplexity": np.exp(reference),
        "perplexity_loss": np.expm1(losses - reference),
        "backbone_loss": np.expm1(around - reference),
        "explained_variance": (1 - errors / distances).mean(1),
    }


def _of_training(source: str, found: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The same for source and targets."""
    own = found[source]
    targets = {name: np.stack([of[name] for domain, of in found.items() if domain != source]) for name in own}
    loss = targets["perplexity_loss"].mean(0)
    return {
        "perplexity_loss_source": own["perplexity_loss"],
        "perplexity_loss_targets": loss,
        "transfer_gap": loss - own["perplexity_loss"],
        EXCESS: (1 + loss) / (1 + own["perplexity_loss"]) - 1,
        "backbone_loss_source": own["backbone_loss"],
        "backbone_loss_targets": targets["backbone_loss"].mean(0),
        "perplexity_targets": np.exp(np.log(targets["perplexity"]).mean(0)),
        "reference_perplexity_targets": np.exp(np.log(targets["reference_perplexity"]).mean(0)),
        "explained_variance_source": own["explained_variance"],
        "explained_variance_targets": targets["explained_variance"].mean(0),
    }


def _figure(draws: np.ndarray) -> Estimate:
    """The value, the first of (1 + R,), with the percentile interval of the resamples."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(draws[1:], [tail, 100 - tail])
    return Estimate(float(draws[0]), float(low), float(high))


def _probe_areas(transfers: Sequence[Transfer], domains: Sequence[str], probes: Probes) -> np.ndarray:
    """(pairs, 2, concepts): AUROC on the source and on a target."""
    pairs = []
    for transfer in transfers:
        for domain in domains:
            if domain != transfer.source:
                of = probes(transfer.on(domain), transfer.source)
                pairs.append([of[transfer.source], of[domain]])
    return np.array(pairs, np.float64)


def _probe_figures(areas: np.ndarray, groups: Sequence[str]) -> dict[str, Estimate]:
    source, target = areas.mean(0)
    return {
        "probe_auroc_source": mean(source, groups),
        "probe_auroc_targets": mean(target, groups),
        "probe_auroc_gap": mean(source - target, groups),
    }


def _verdict(
    figures: Mapping[str, Mapping[str, Estimate]],
    less: Mapping[str, Mapping[str, Estimate]],
    by_seed: Mapping[str, Mapping[str, Sequence[float]]],
) -> tuple[Outcome, str]:
    if missing := [name for name in (MFN, POST_HOC_SAE, FINE_TUNED_SAE) if name not in figures]:
        return "not measured", f"There is no {' and no '.join(missing)}."
    own = figures[MFN][HEADLINE]

    def below(baseline: str, figure: str) -> bool:
        of_seeds = less_by_seed(by_seed[MFN][figure], by_seed[baseline][figure])
        return less[baseline][figure].high < 0 and max(of_seeds) < 0

    within = own.high <= LIMIT and max(by_seed[MFN][HEADLINE]) <= LIMIT
    better = {name: below(name, HEADLINE) for name in (POST_HOC_SAE, FINE_TUNED_SAE)}
    # one that was fine-tuned on the others has learnt there, and has no gap to compare
    carried = below(POST_HOC_SAE, EXCESS)
    outcome: Outcome = "not confirmed"
    if carried and within and all(better.values()):
        outcome = "confirmed"
    elif carried and (within or better[POST_HOC_SAE]):
        outcome = "partly"
    compared = "; ".join(
        f"{_percent(figures[name][HEADLINE])} with the {name}, which is {'' if better[name] else 'not surely '}more"
        for name in better
    )
    reason = (
        f"On other domains perplexity through features is {_percent(own)} above the dense model's, "
        f"{'' if within else 'not surely '}within 5 % in all seeds; {compared}. The excess over the loss on the source "
        f"is {_percent(figures[MFN][EXCESS])}, and {_percent(figures[POST_HOC_SAE][EXCESS])} with the {POST_HOC_SAE}: "
        f"{_percent(less[POST_HOC_SAE][EXCESS])}, {'' if carried else 'not surely '}less."
    )
    return outcome, reason


def _percent(figure: Estimate) -> str:
    interval = "" if np.isnan(figure.low) else f" [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"
    return f"{100 * figure.value:.1f}{interval} %"


def _check(subjects: Mapping[str, Sequence[Transfer]], windows: Mapping[str, Windows]) -> None:
    if subjects and len(windows) < 2:
        raise ValueError(f"windows are of the domains {list(windows)}; transfer needs two or more")
    for name, transfers in subjects.items():
        if not transfers:
            raise ValueError(f"{name} has no training; leave it out, or give at least one")
        for transfer in transfers:
            if unknown := {transfer.source, *transfer.tuned} - set(windows):
                raise ValueError(f"{name} has the domain {min(unknown)!r}; windows are of {', '.join(windows)}")


__all__ = ["FINE_TUNED_SAE", "Transfer", "transfer_gap"]

"""How an MFN model is trained: the arguments of `MFNTrainer`."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..model.configuration_mfn import MFNConfig, check_alpha, check_k
from ..model.feature_names import parse_feature
from .schedules import Schedule, Shape, resolve_steps


def parse_trainable_features(given: Any) -> dict[str, list[int]] | None:
    """Layer -> features, in JSON's form, of `{6: [7, 9]}`, of `["L6/7", "L6/9"]`, or of either as JSON or as
    `"L6/7,L6/9"`; `None` of `None`. `ValueError` for anything else."""
    if given is None:
        return None
    try:
        features = sorted({(int(layer), operator.index(index)) for layer, index in _names(given)})
    except (TypeError, ValueError):
        features = []
    if not features:
        raise ValueError(f'trainable_features is {given!r}; it must name features, {{"6": [7, 9]}} or ["L6/7", "L6/9"]')
    chosen: dict[str, list[int]] = {}
    for layer, index in features:
        chosen.setdefault(str(layer), []).append(index)
    return chosen


def _names(given: Any) -> list[tuple[Any, Any]]:
    if isinstance(given, str):
        given = json.loads(given) if given.lstrip().startswith(("{", "[")) else given.split(",")
    if isinstance(given, Mapping):
        return [(layer, index) for layer, indices in given.items() for index in indices]
    # a pair that was JSON for a while is a list
    return [parse_feature(name.strip() if isinstance(name, str) else tuple(name)) for name in given]


LAMBDAS = ("recon", "rate", "comp", "stab", "util", "aux")


CACHED = {"alpha_start": 0.0, "alpha_end": 0.0, "lambda_util": 0.0, "stability_pass": "layer"}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class MFNTrainingArguments(TrainingArguments):
    """`TrainingArguments`, and how MFN layers are trained. An amount of training (`..._warmup`, `..._anneal`) is a
    share of it up to 1 and a number of steps above."""

    lambda_recon: float = _option(10.0, "Weight of the reconstruction loss, eq. 5.")
    lambda_rate: float = _option(0.0, "Weight of the rate loss, eq. 6.")
    lambda_comp: float = _option(0.0, "Weight of the competition loss, eq. 7.")
    lambda_stab: float = _option(0.0, "Weight of the stability loss, eq. 8.")
    lambda_util: float = _option(1.0, "Weight of the next-token loss, eq. 9.")
    lambda_aux: float | None = _option(
        None, "Weight of the auxiliary reconstruction by features under the rate floor; by default lambda_recon / 32."
    )
    normalize_losses: bool = _option(
        True,
        "Count reconstruction errors as a share of the residual's variance over tokens, and competition and stability "
        "in units of the code's mean square: one set of weights then serves every layer. Without it, eqs. 5, 7 and 8 "
        "as written.",
    )

    stop_gradient: bool = _option(
        True,
        "Feature losses train the MFN layers alone, as in section 4.5. Without it they reach the backbone, too, which "
        "then learns a residual stream that is easier to reconstruct.",
    )

    rho: float | None = _option(None, "Target firing rate of eq. 6; by default k / m, which moves with k.")
    rate_estimator: Literal["rectangle", "zmass", "sigmoid"] = _option(
        "rectangle", "What stands in for the gradient of a firing rate."
    )
    rate_width: float = _option(0.5, "Width of the rectangle or sigmoid, in mean active values of the token.")
    stability_pass: Literal["layer", "model"] = _option(
        "layer", "Perturb each MFN layer's input, or the embeddings in a second pass through the model."
    )
    stability_perturbation: Literal["noise", "dropout"] = _option("noise", "How z_tilde's input differs.")
    stability_strength: float = _option(0.1, "Noise as a share of the input's RMS, or the dropout probability.")
    stability_fraction: float = _option(0.25, "Share of the tokens (model pass: rows) that the stability loss sees.")
    util_target: Literal["tokens", "kl"] = _option(
        "tokens", "What the utility loss asks for: the next token, or the base model's distribution of it."
    )

    rate_floor: float = _option(0.01, "Features that fire less than this share of rho take part in the auxiliary loss.")
    rate_window: int = _option(50_000, "Tokens over which firing rates are averaged; silent for as long is dead.")
    aux_k: int | None = _option(
        None, "Active features of the auxiliary reconstruction; by default half the hidden size."
    )
    reinit_dead_every: int = _option(0, "Steps between re-initialisations of dead features; 0 for none.")

    trainable: Literal["all", "mfn"] = _option(
        "all", "What is trained: all that requires gradients, or the MFN layers alone."
    )
    trainable_features: dict | str | None = field(  # a list, too; HfArgumentParser has no type for that
        default=None,
        metadata={
            "help": 'Features that are trained, {"6": [7, 9]} or ["L6/7", "L6/9"], while all else stays as it is, to '
            "the bit; by default all that `trainable` says."
        },
    )
    mfn_learning_rate: float | None = _option(
        None,
        "Peak learning rate of the MFN layers, which bear far more than a pretrained backbone; by default the same.",
    )
    mfn_warmup: float = _option(
        0.0, "Training at the start for MFN layers alone, at the first alpha and k, no utility."
    )
    alpha_start: float = _option(0.0, "Blend at the first step.")
    alpha_end: float = _option(1.0, "Blend after annealing.")
    alpha_anneal: float = _option(0.5, "Training over which alpha moves, after the warm-up.")
    alpha_shape: Literal["linear", "cosine", "stepped"] = _option("linear", "How alpha moves.")
    k_start: int | None = _option(None, "Active features at the first step; by default k stays the model's.")
    k_end: int | None = _option(None, "Active features after annealing.")
    k_anneal: float = _option(0.5, "Training over which k moves, after the warm-up.")
    k_shape: Literal["linear", "cosine", "stepped"] = _option("linear", "How k moves.")
    schedule_stairs: int = _option(8, "Jumps of a stepped schedule.")

    log_layers: bool = _option(False, "Log every figure for each MFN layer, too.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.trainable_features = parse_trainable_features(self.trainable_features)
        if self.trainable_features and self.reinit_dead_every:
            raise ValueError(f"reinit_dead_every is {self.reinit_dead_every}; with trainable_features it must be 0")
        for part in LAMBDAS:
            if not 0 <= self.weight(part) < float("inf"):
                raise ValueError(f"lambda_{part} is {self.weight(part)}; it must be a finite number of at least 0")
        if not any(getattr(self, f"lambda_{part}") for part in LAMBDAS[:-1]):
            raise ValueError("lambda_recon and all other weights of losses are 0; there is nothing to train on")
        for name, hint in get_type_hints(MFNTrainingArguments).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                allowed = ", ".join(get_args(hint))
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {allowed}")
        for name in ("alpha_anneal", "k_anneal", "mfn_warmup"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share of the training, or steps above 1")
        for name in ("stability_fraction", "rate_width", "mfn_learning_rate"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number above 0")
        for name in ("rate_window", "aux_k", "schedule_stairs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a whole number of at least 1")
        self._check_ranges()
        if self.max_steps > 0:  # else it is known once the training begins
            self.check_schedules(self.max_steps)

    def _check_ranges(self) -> None:
        if self.mfn_warmup and not self.lambda_recon:
            raise ValueError("lambda_recon is 0, but the warm-up (mfn_warmup) trains on the reconstruction")
        check_alpha(self.alpha_start)
        check_alpha(self.alpha_end)
        if (self.k_start is None) != (self.k_end is None):
            raise ValueError(f"k_start is {self.k_start} and k_end is {self.k_end}; give both or neither")
        if self.stability_fraction > 1:
            raise ValueError(f"stability_fraction is {self.stability_fraction}; it is a share, at most 1")
        if self.rho is not None and not 0 < self.rho < 1:
            raise ValueError(f"rho is {self.rho}; a firing rate lies between 0 and 1")
        if self.stability_strength < 0 or (self.stability_perturbation == "dropout" and self.stability_strength >= 1):
            raise ValueError(f"stability_strength is {self.stability_strength}; it must be at least 0, dropout below 1")
        if not 0 <= self.rate_floor <= 1:
            raise ValueError(f"rate_floor is {self.rate_floor}; it is a share of rho, from 0 to 1")
        optimizer = OptimizerNames(self.optim).value
        if optimizer.startswith("schedule_free"):
            raise ValueError(
                f"optim is {optimizer!r}; an average of weights, as it is saved, does not keep directions at unit norm"
            )
        if self.reinit_dead_every and ("8bit" in optimizer or "4bit" in optimizer):
            raise ValueError(
                f"optim is {optimizer!r}, whose quantised moments cannot be reset; reinit_dead_every must be 0"
            )
        if self.reinit_dead_every < 0:
            raise ValueError(f"reinit_dead_every is {self.reinit_dead_every}; it must be a number of steps, 0 for none")
        if self.label_smoothing_factor != 0:
            raise ValueError(f"label_smoothing_factor is {self.label_smoothing_factor}; MFN models are trained without")

    def weight(self, part: str) -> float:
        """lambda of a part of the objective."""
        chosen = getattr(self, f"lambda_{part}")
        return self.lambda_recon / 32 if chosen is None else chosen

    def check_model(self, config: MFNConfig) -> None:
        """`ValueError` for what does not fit a model of this config."""
        for k in (self.k_start, self.k_end):
            if k is not None:
                check_k(k, config.num_features, config.most_removed)
        if self.lambda_rate and self.rho is None:
            used = {"k": config.k} if self.k_start is None else {"k_start": self.k_start, "k_end": self.k_end}
            for name, k in used.items():
                if k == config.num_features:
                    raise ValueError(
                        f"{name} is {k}, all features, so that the rate loss has no target (rho, by default k / m, "
                        f"would be 1); choose a smaller {name}, or set rho or lambda_rate=0"
                    )

    def check_cached(self) -> None:
        """`ValueError` for what a training on cached residual streams cannot do: they are those at alpha 0, and of the
        model nothing but its MFN layers is there."""
        for name, allowed in CACHED.items():
            if getattr(self, name) != allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; on cached residual streams it must be {allowed!r}"
                )

    def check_schedules(self, total_steps: int) -> None:
        """`ValueError` if a training of `total_steps` optimizer steps ends before alpha or k has arrived at its end."""
        for name in ("alpha", "k"):
            start, end, anneal = (getattr(self, f"{name}_{part}") for part in ("start", "end", "anneal"))
            needed = round(resolve_steps(self.mfn_warmup, total_steps) + resolve_steps(anneal, total_steps))
            if start != end and needed > total_steps:
                raise ValueError(
                    f"mfn_warmup is {self.mfn_warmup} and {name}_anneal is {anneal}, {needed} steps together; the "
                    f"training has {total_steps}, in which {name} would not reach {name}_end, {end}"
                )

    def warmup_end(self, total_steps: int) -> int:
        """The first step of joint training, of `total_steps` optimizer steps."""
        return round(resolve_steps(self.mfn_warmup, total_steps))

    def alpha_schedule(self, total_steps: int) -> Schedule:
        """Alpha over a training of `total_steps` optimizer steps."""
        return self._schedule(self.alpha_start, self.alpha_end, self.alpha_anneal, self.alpha_shape, total_steps)

    def k_schedule(self, total_steps: int) -> Schedule | None:
        """k likewise (to be rounded), or `None` where it stays as it is."""
        if self.k_start is None or self.k_end is None:
            return None
        return self._schedule(self.k_start, self.k_end, self.k_anneal, self.k_shape, total_steps)

    def has_arrived(self, config: MFNConfig) -> bool:
        """Whether a model of this config has the alpha and k with which its training ends."""
        return config.alpha == self.alpha_end and self.k_end in (None, config.k)

    def _schedule(self, start: float, end: float, anneal: float, shape: Shape, total_steps: int) -> Schedule:
        begin = self.warmup_end(total_steps)
        # shares that are rounded each by itself may be a step too long together
        steps = min(round(resolve_steps(anneal, total_steps)), total_steps - begin)
        return Schedule(start, end, steps, begin, shape, self.schedule_stairs)


__all__ = [
    "MFNTrainingArguments",
    "parse_trainable_features",
]

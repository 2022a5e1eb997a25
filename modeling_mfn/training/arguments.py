"""Arguments of `MFNTrainer`: which losses an MFN model is trained on, which features, and how alpha and k move."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..model.checks import as_number, check_type, is_whole, shown
from ..model.configuration_mfn import MFNConfig
from ..model.feature_names import parse_feature
from ..model.setting_checks import check_alpha, check_k
from ..utils.readers import parse_json
from .schedules import Schedule, Shape, resolve_steps

LAMBDAS = ("recon", "rate", "comp", "stab", "util", "aux", "streams", "named")
"""Parts of the objective; `lambda_<part>` is the weight of each."""
OF_THE_MODEL = ("util", "streams")
"""Parts that are not means over MFN layers."""
AUX_SHARE = 1 / 32
"""lambda_aux as a share of lambda_recon, by default: the weight of AuxK in Gao et al. 2024."""
ON_CACHED_RESIDUALS = {
    "alpha_start": 0.0,
    "alpha_end": 0.0,
    "lambda_util": 0.0,
    "lambda_named": 0.0,
    "stability_pass": "layer",
}
"""Values that a training on cached residual streams must have: the streams are those at alpha 0, and nothing of the
model but its MFN layers is there."""
WITH_AN_OWN_LOSS = {"util_target": "tokens", "lambda_named": 0.0}
"""Values that a trainer with a loss of its own must have: it brings the utility loss, and drops other columns."""
REMOVED = {"rate_estimator": "rectangle", "rate_width": 0.5, "schedule_stairs": 8}
"""Options that only version 0.1.0 had -> the value that every training has now."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class MFNTrainingArguments(TrainingArguments):
    """`TrainingArguments` of transformers, and how MFN layers are trained.

    An amount of training (`mfn_warmup`, `alpha_anneal`, `k_anneal`) is a share of all steps up to 1, and a number of
    steps above 1.

    Raises:
        ValueError: if an option is out of range, or two options exclude each other. The message names both.
    """

    lambda_recon: float = _option(10.0, "Weight of the reconstruction loss, eq. 5.")
    lambda_rate: float = _option(0.0, "Weight of the rate loss, eq. 6.")
    lambda_comp: float = _option(0.0, "Weight of the competition loss, eq. 7.")
    lambda_stab: float = _option(0.0, "Weight of the stability loss, eq. 8.")
    lambda_util: float = _option(1.0, "Weight of the utility loss, eq. 9: next-token prediction.")
    lambda_aux: float | None = _option(
        None,
        "Weight of the auxiliary loss: rare features reconstruct the error of the others. Default: lambda_recon / 32.",
    )
    lambda_streams: float = _option(
        0.0,
        "Weight of the distance of each block's residual stream to the base model's. It needs util_target kl, which "
        "runs the base model.",
    )
    lambda_named: float = _option(
        0.0,
        "Weight of the loss of named features. It is supervised and not in the paper: these features mean their "
        "concepts by construction.",
    )
    named_features: list[str] | None = field(
        default=None,
        metadata={
            "help": "Feature of each concept, such as L2/0 L2/1. The data's column concepts has the concept of each "
            "token: its place in this list, or -1."
        },
    )
    normalize_losses: bool = _option(
        True,
        "Divide the losses of eqs. 5, 7 and 8 by the variance of the residual stream or the mean square of the code. "
        "One set of weights then serves every layer. False gives the equations as written.",
    )
    stop_gradient: bool = _option(
        True,
        "Stop the gradients of the feature losses at the layer's input (section 4.5). If False, the backbone learns a "
        "residual stream that is easier to reconstruct.",
    )

    rho: float | None = _option(None, "Target firing rate of eq. 6. Default: k / m, which follows k.")
    stability_pass: Literal["layer", "model"] = _option(
        "layer", "Perturb the input of each MFN layer, or the embeddings in a second pass through the model."
    )
    stability_perturbation: Literal["noise", "dropout"] = _option(
        "noise", "Kind of perturbation in the stability loss: Gaussian noise, or entries set to 0."
    )
    stability_strength: float = _option(
        0.1, "Strength of the perturbation: noise as a share of the input's RMS, or the dropout probability."
    )
    stability_fraction: float = _option(
        0.25, "Share of tokens that the stability loss sees; of rows with stability_pass model."
    )
    util_target: Literal["tokens", "kl"] = _option(
        "tokens", "Target of the utility loss: the next token, or its distribution in the base model."
    )

    rate_floor: float = _option(
        0.01, "Firing rate, as a share of rho, below which a feature takes part in the auxiliary loss."
    )
    rate_window: int = _option(
        50_000, "Tokens that firing rates are averaged over. A feature is dead if it is silent for as many tokens."
    )
    aux_k: int | None = _option(None, "Active features of the auxiliary loss. Default: half the hidden size.")
    reinit_dead_every: int = _option(0, "Steps between re-initialisations of dead features. 0 means never.")

    trainable: Literal["all", "mfn"] = _option(
        "all", "Train all parameters that require gradients, or the MFN layers alone."
    )
    trainable_features: dict | str | None = field(  # or a list; HfArgumentParser has no type for all of them
        default=None,
        metadata={
            "help": 'Features to train, as {"6": [7, 9]} or ["L6/7", "L6/9"]. Everything else stays bit for bit as it '
            "is. Default: all features."
        },
    )
    mfn_learning_rate: float | None = _option(
        None, "Peak learning rate of the MFN layers, which can be far above the backbone's. Default: learning_rate."
    )
    mfn_warmup: float = _option(
        0.0, "Amount of training at the start for the MFN layers alone, without utility loss; alpha and k stay."
    )
    alpha_start: float = _option(0.0, "Blend alpha at the first step.")
    alpha_end: float = _option(1.0, "Blend alpha after annealing.")
    alpha_anneal: float = _option(0.25, "Amount of training in which alpha moves, after the warm-up.")
    alpha_shape: Literal["linear", "cosine"] = _option("linear", "Shape of the path of alpha.")
    k_start: int | None = _option(None, "Active features per token at the first step. Default: the model's k.")
    k_end: int | None = _option(None, "Active features per token after annealing. Default: the model's k.")
    k_anneal: float = _option(0.5, "Amount of training in which k moves, after the warm-up.")
    k_shape: Literal["linear", "cosine"] = _option("linear", "Shape of the path of k.")

    skip_nonfinite_steps: int = _option(
        0, "Steps with a loss or gradient that is not finite that a training leaves out. The next one stops it."
    )
    log_layers: bool = _option(False, "Log every figure per MFN layer, too.")

    def __init_subclass__(cls) -> None:
        later = cls.__mro__[cls.__mro__.index(MFNTrainingArguments) + 1 : cls.__mro__.index(TrainingArguments)]
        others = [each.__name__ for each in later if issubclass(each, TrainingArguments)]
        if others:
            raise TypeError(
                f"{cls.__name__} names MFNTrainingArguments before {others[0]}, whose defaults would be lost; name "
                "MFNTrainingArguments last"
            )

    def __post_init__(self) -> None:
        self._check_types()
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch would warn at every start
        self.trainable_features = parse_trainable_features(self.trainable_features)
        self._check_losses()
        self._check_numbers()
        self._check_k_and_alpha()
        self._check_optimizer()
        if self.max_steps > 0:  # otherwise the number of steps is known once the training begins
            self.check_schedules(self.max_steps)

    def _check_losses(self) -> None:
        for part in LAMBDAS:
            if not 0 <= self.weight(part) < float("inf"):
                raise ValueError(f"lambda_{part} is {self.weight(part)}; it must be a finite number of at least 0")
        if not any(self.weight(part) for part in LAMBDAS if part != "aux"):
            raise ValueError("lambda_recon and all other weights of losses are 0; there is nothing to train on")
        if self.lambda_streams and not (self.util_target == "kl" and self.lambda_util):
            raise ValueError(
                f"lambda_streams is {self.lambda_streams}, and util_target {self.util_target!r} with lambda_util "
                f"{self.lambda_util} does not run the base model; set util_target to 'kl' and lambda_util above 0"
            )
        if bool(self.lambda_named) != bool(self.named_features):
            raise ValueError(
                f"lambda_named is {self.lambda_named} and named_features is {self.named_features}; set both or neither"
            )
        if self.mfn_warmup and not self.lambda_recon:
            raise ValueError("lambda_recon is 0, but the warm-up (mfn_warmup) trains on the reconstruction")
        if self.label_smoothing_factor != 0:
            raise ValueError(f"label_smoothing_factor is {self.label_smoothing_factor}; MFN models are trained without")

    def _check_types(self) -> None:
        """Checks the types of MFN's own options, and of those of the Trainer that are numbers or switches."""
        for name, kind in get_type_hints(MFNTrainingArguments).items():
            parts = set(get_args(kind) if get_origin(kind) is UnionType else [kind])
            own = name in MFNTrainingArguments.__annotations__ and name != "trainable_features"
            value = getattr(self, name)
            if own or parts <= {int, float, bool, NoneType}:
                check_type(name, value, kind)
            if is_whole(value) or (own and isinstance(value, float)):
                as_number(name, value)

    def _check_numbers(self) -> None:
        for name in ("alpha_anneal", "k_anneal", "mfn_warmup"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be a share of the training, or a number of steps above 1"
                )
        for name in ("stability_fraction", "mfn_learning_rate"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number above 0")
        for name, least in (("rate_window", 1), ("aux_k", 1), ("skip_nonfinite_steps", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a whole number of at least {least}")
        if self.stability_fraction > 1:
            raise ValueError(f"stability_fraction is {self.stability_fraction}; it is a share, at most 1")
        if self.rho is not None and not 0 < self.rho < 1:
            raise ValueError(f"rho is {self.rho}; a firing rate lies between 0 and 1")
        if self.stability_strength < 0 or (self.stability_perturbation == "dropout" and self.stability_strength >= 1):
            raise ValueError(f"stability_strength is {self.stability_strength}; it must be at least 0, dropout below 1")
        if not 0 <= self.rate_floor <= 1:
            raise ValueError(f"rate_floor is {self.rate_floor}; it is a share of rho, from 0 to 1")

    def _check_k_and_alpha(self) -> None:
        check_alpha(self.alpha_start, "alpha_start")
        check_alpha(self.alpha_end, "alpha_end")
        if (self.k_start is None) != (self.k_end is None):
            raise ValueError(f"k_start is {self.k_start} and k_end is {self.k_end}; give both or neither")

    def _check_optimizer(self) -> None:
        optimizer = OptimizerNames(self.optim).value
        if optimizer.startswith("schedule_free"):
            raise ValueError(
                f"optim is {optimizer!r}; it saves an average of weights, which does not keep directions at unit norm"
            )
        if self.moves_in_backward:
            for name in ("trainable_features", "skip_nonfinite_steps"):
                if value := getattr(self, name):
                    raise ValueError(
                        f"{name} is {value}, and optim is {optimizer!r}, which moves the weights in the backward pass; "
                        "choose another optimizer"
                    )
        if self.reinit_dead_every < 0:
            raise ValueError(f"reinit_dead_every is {self.reinit_dead_every}; it must be a number of steps, 0 for none")
        if self.reinit_dead_every and ("8bit" in optimizer or "4bit" in optimizer):
            raise ValueError(
                f"optim is {optimizer!r}, whose quantised moments cannot be reset; reinit_dead_every must be 0"
            )
        if self.trainable_features and self.reinit_dead_every:
            raise ValueError(f"reinit_dead_every is {self.reinit_dead_every}; with trainable_features it must be 0")

    @property
    def moves_in_backward(self) -> bool:
        """True for an optimizer that moves the weights in the backward pass, so that no step can be changed later."""
        return any(each in OptimizerNames(self.optim).value for each in ("lomo", "layerwise"))

    def weight(self, part: str) -> float:
        """Weight lambda of a part of the objective, one of [`LAMBDAS`]."""
        chosen = getattr(self, f"lambda_{part}")
        return self.lambda_recon * AUX_SHARE if chosen is None else chosen

    def check_model(self, config: MFNConfig) -> None:
        """Raises `ValueError` if these arguments do not fit a model of this config, or if it is steered by default."""
        if (active := getattr(config, "active_preset", None)) is not None:  # code of earlier versions has none
            raise ValueError(
                f"active_preset is {active!r}, and a model in training must not be steered: set "
                "model.config.active_preset to None"
            )
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
        """Raises `ValueError` if these arguments need more than cached residual streams."""
        for name, allowed in ON_CACHED_RESIDUALS.items():
            if getattr(self, name) != allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; on cached residual streams it must be {allowed!r}"
                )

    def check_own_loss(self, trainer: str) -> None:
        """Raises `ValueError` if these arguments need another utility loss than a trainer of this name has."""
        for name, allowed in WITH_AN_OWN_LOSS.items():
            if getattr(self, name) != allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; {trainer} has a loss of its own, and it must be {allowed!r}"
                )

    def check_schedules(self, total_steps: int) -> None:
        """Raises `ValueError` if a training of `total_steps` steps ends before alpha or k arrives at its end."""
        for name in ("alpha", "k"):
            start, end, anneal = (getattr(self, f"{name}_{part}") for part in ("start", "end", "anneal"))
            needed = round(resolve_steps(self.mfn_warmup, total_steps) + resolve_steps(anneal, total_steps))
            if start != end and needed > total_steps:
                raise ValueError(
                    f"mfn_warmup is {self.mfn_warmup} and {name}_anneal is {anneal}, {needed} steps together; the "
                    f"training has {total_steps}, in which {name} would not reach {name}_end, {end}"
                )

    def warmup_end(self, total_steps: int) -> int:
        """First step of joint training, in a training of `total_steps` steps."""
        return round(resolve_steps(self.mfn_warmup, total_steps))

    def alpha_schedule(self, total_steps: int) -> Schedule:
        """Schedule of alpha in a training of `total_steps` steps."""
        return self._schedule(self.alpha_start, self.alpha_end, self.alpha_anneal, self.alpha_shape, total_steps)

    def k_schedule(self, total_steps: int) -> Schedule | None:
        """Schedule of k, to be rounded, in a training of `total_steps` steps; `None` if k stays the model's."""
        if self.k_start is None or self.k_end is None:
            return None
        return self._schedule(self.k_start, self.k_end, self.k_anneal, self.k_shape, total_steps)

    def has_arrived(self, config: MFNConfig) -> bool:
        """True if a model of this config has the alpha and k with which the training ends."""
        return config.alpha == self.alpha_end and self.k_end in (None, config.k)

    def _schedule(self, start: float, end: float, anneal: float, shape: Shape, total_steps: int) -> Schedule:
        begin = self.warmup_end(total_steps)
        # two rounded shares may be a step too long together
        steps = min(round(resolve_steps(anneal, total_steps)), total_steps - begin)
        return Schedule(start, end, steps, begin, shape)


def parse_trainable_features(given: Any) -> dict[str, list[int]] | None:
    """Reads which features to train.

    Args:
        given: `{6: [7, 9]}`, `["L6/7", "L6/9"]`, either of these as JSON, `"L6/7,L6/9"`, or `None`.

    Returns:
        Layer -> ascending features, with layers as strings, as in JSON; `None` for `None`.

    Raises:
        ValueError: if `given` names no features.
    """
    if given is None:
        return None
    try:
        features = sorted({(int(layer), operator.index(index)) for layer, index in _pairs(given)})
    except (AttributeError, TypeError, ValueError, OverflowError, RecursionError):
        features = []
    if not features:
        raise ValueError(
            f'trainable_features is {shown(given)}; it must name features, {{"6": [7, 9]}} or ["L6/7", "L6/9"]'
        )
    chosen: dict[str, list[int]] = {}
    for layer, index in features:
        chosen.setdefault(str(layer), []).append(index)
    return chosen


def _pairs(given: Any) -> list[tuple[Any, Any]]:
    """(layer, index) pairs, unchecked."""
    if isinstance(given, str):
        given = parse_json(given, Any) if given.lstrip().startswith(("{", "[")) else given.split(",")
    if isinstance(given, Mapping):
        return [(layer, index) for layer, indices in given.items() for index in indices]
    # JSON turns a pair into a list
    return [parse_feature(name.strip() if isinstance(name, str) else tuple(name)) for name in given]


def without_removed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Drops the options of version 0.1.0 that are gone from the arguments of a file.

    Raises:
        ValueError: if such an option is set to another value than its default.
    """
    for name, value in REMOVED.items():
        if arguments.get(name, value) != value:
            raise ValueError(f"{name} is {arguments[name]!r}; this option is gone, and training uses {value!r}")
    return {name: value for name, value in arguments.items() if name not in REMOVED}


__all__ = ["MFNTrainingArguments", "parse_trainable_features", "without_removed"]

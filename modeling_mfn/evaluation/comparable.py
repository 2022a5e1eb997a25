"""Checks, before anything is trained or measured, that models and texts can be compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from ..data.text import check_window
from ..model.configuration_mfn import MFNConfig
from ..model.twins import is_a
from ..training.record import read_record

if TYPE_CHECKING:
    from datasets import Dataset


def check_alike(
    models: Sequence[str], no_rate: Sequence[str], base: str | None, dense: Sequence[str], window: int
) -> None:
    """Checks that models have the same size and can read windows of this length.

    Args:
        models, no_rate: MFN models, each a folder or a Hub id. All must have the size of the first.
        base, dense: plain models, which must have the size of the first model's backbone.
        window: tokens per window.

    Raises:
        ValueError: if a size differs, the first model is not an MFN model, or windows are too long for it.
    """
    first = AutoConfig.from_pretrained(models[0])
    if not is_a(first, MFNConfig):
        raise ValueError(f"{models[0]} is a {first.model_type} model; give an MFN model, as mfn convert makes them")
    check_window(window, first)
    _check_same(models[0], _place_and_size(first), [*models[1:], *no_rate], _place_and_size)
    others = [*([] if base is None else [base]), *dense]
    _check_same(f"the backbone of {models[0]}", _shape(first.text_config), others, _shape)


def _place_and_size(config: Any) -> dict[str, Any]:
    names = ("layers", "num_features", "k", "hidden_size", "vocab_size")
    return {"model_type": config.model_type} | {name: getattr(config, name, None) for name in names}


def _shape(config: Any) -> dict[str, Any]:
    names = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
    return {name: getattr(config, name, None) for name in names}


def _check_same(
    name: str, expected: Mapping[str, Any], others: Sequence[str], describe: Callable[[Any], dict[str, Any]]
) -> None:
    for other in others:
        for what, value in describe(AutoConfig.from_pretrained(other)).items():
            if value != expected[what]:
                raise ValueError(f"{what} of {other} is {value}; that of {name} is {expected[what]}")


def check_held_out(held_out: Mapping[str, Dataset], training: Mapping[str, Dataset], window: int) -> None:
    """Checks that held-out texts are long enough and are not training text.

    Args:
        held_out: domain -> windows to measure on.
        training: domain -> windows that baselines learn from.
        window: tokens per window.

    Raises:
        ValueError: if a text has fewer than two windows, or most of its windows are training windows.
    """
    learnt = {tuple(row) for rows in training.values() for row in rows["input_ids"]}
    for name, rows in held_out.items():
        if len(rows) < 2:
            raise ValueError(f"text {name!r} has {len(rows)} windows of {window} tokens; intervals need at least 2")
        seen = sum(tuple(row) in learnt for row in rows["input_ids"])
        if 2 * seen > len(rows):
            raise ValueError(
                f"{seen} of {len(rows)} windows of text {name!r} are in train-text; give text that no "
                "model was trained on"
            )


def tokens_of(model: str | os.PathLike[str]) -> int | None:
    """Returns the number of tokens in a model's last training without padding, or `None` if that is not recorded."""
    record = read_record(model)
    return None if record is None else record.tokens or None


__all__ = ["check_alike", "check_held_out", "tokens_of"]

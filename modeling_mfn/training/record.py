"""Records of how a model was trained, and the search for a training's last complete checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..model.configuration_mfn import MFNConfig
from ..model.version import __version__
from ..utils.files import read_json, write_whole
from .arguments import MFNTrainingArguments

RECORD_FILE = "training_record.json"
PRIVATE = (
    *("_dir", "_path", "_url", "_host", "token", "name", "_id", "project", "resume_from_checkpoint"),
    *("deepspeed", "fsdp_config", "accelerator_config"),  # a path, or the content of the file
)
"""Endings of argument names that a record leaves out: local paths, secrets and names."""


def find_complete_checkpoint(folder: str | Path) -> str | None:
    """Finds the last complete checkpoint in a folder, or `None`. A checkpoint that was interrupted is passed over."""
    found = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = [path for path in found if path.name.rpartition("-")[2].isdigit()]
    numbered.sort(key=checkpoint_step, reverse=True)
    return next((str(path) for path in numbered if _is_complete(path)), None)


def checkpoint_step(folder: str | Path) -> int:
    """Reads the optimizer step of a checkpoint from its name."""
    return int(Path(folder).name.rpartition("-")[2])


def _is_complete(checkpoint: Path) -> bool:
    # the Trainer writes its state after everything else
    try:
        return read_json(checkpoint / TRAINER_STATE_NAME, dict[str, Any]) is not None
    except ValueError:
        return False


@dataclass
class TrainingRecord:
    """Content of `training_record.json`."""

    versions: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    planned_steps: int | None = None
    tokens: int | None = None
    processes: int | None = None
    alpha: float | None = None
    k: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    """Last logged figures."""


def read_record(folder: str | os.PathLike[str]) -> TrainingRecord | None:
    """Reads the record next to a model; None if there is none, `ValueError` if it is damaged."""
    return read_json(Path(folder) / RECORD_FILE, TrainingRecord)


def write_record(folder: str | Path, args: MFNTrainingArguments, state: TrainerState, config: MFNConfig) -> None:
    """Writes how a model was trained next to the model.

    The record holds MFN's arguments, the Trainer's arguments that differ from their defaults, tokens, alpha, k, and the
    last logged figures. These may be of an earlier step.
    """
    figures: dict[str, Any] = {}
    for entry in state.log_history:
        figures |= entry
    record = {
        "versions": {"modeling_mfn": __version__, "transformers": version("transformers"), "torch": version("torch")},
        "arguments": _chosen(args),
        "steps": state.global_step,
        "planned_steps": state.max_steps,
        "tokens": state.num_input_tokens_seen,
        "processes": args.world_size,
        "alpha": config.alpha,
        "k": config.k,
        "figures": {name: value for name, value in figures.items() if name not in ("alpha", "k")},
    }
    text = json.dumps(_without_nan(record), indent=2, sort_keys=True, allow_nan=False)
    write_whole(Path(folder) / RECORD_FILE, text + "\n")


def _without_nan(value: Any) -> Any:
    """Returns a value of JSON, null in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _chosen(args: MFNTrainingArguments) -> dict[str, Any]:
    """Arguments of MFN, and those of the Trainer that were set; without paths and secrets."""
    given = args.to_dict()
    chosen = {}
    for option in dataclasses.fields(args):
        own = option.name in MFNTrainingArguments.__annotations__
        value = given[option.name]
        plain = isinstance(value, bool | int | float | str) and not option.name.endswith(PRIVATE)
        if own or (plain and value != option.default and not _is_absolute(value)):
            chosen[option.name] = value
    return chosen


def _is_absolute(value: Any) -> bool:
    return isinstance(value, str) and (Path(value).is_absolute() or PureWindowsPath(value).is_absolute())


__all__ = [
    "RECORD_FILE",
    "TrainingRecord",
    "checkpoint_step",
    "find_complete_checkpoint",
    "read_record",
    "write_record",
]

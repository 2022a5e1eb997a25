"""Checkpoints of a training: which one is whole, and the record of how a model was trained."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..model.configuration_mfn import MFNConfig
from ..model.version import __version__
from .arguments import MFNTrainingArguments

RECORD_FILE = "training_record.json"
PRIVATE = (
    *("_dir", "token", "name", "_id", "project", "resume_from_checkpoint"),
    *("deepspeed", "fsdp_config", "accelerator_config"),  # a file of the user's, or what is in it
)
"""Endings of the arguments that a record leaves out."""


def find_complete_checkpoint(folder: str | Path) -> str | None:
    """The last checkpoint in a folder that was written to its end, or `None`. One whose process was killed while it
    wrote is passed over."""
    found = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = [path for path in found if path.name.rpartition("-")[2].isdigit()]
    numbered.sort(key=checkpoint_step, reverse=True)
    return next((str(path) for path in numbered if _is_complete(path)), None)


def checkpoint_step(folder: str | Path) -> int:
    """The optimizer steps that were done when the Trainer wrote a checkpoint, which are in its name."""
    return int(Path(folder).name.rpartition("-")[2])


def _is_complete(checkpoint: Path) -> bool:
    # the Trainer writes its state last
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def write_record(folder: str | Path, args: MFNTrainingArguments, state: TrainerState, config: MFNConfig) -> None:
    """Writes how the model beside it was trained: arguments that differ from their defaults, tokens, its alpha and k,
    and the last figures that were logged, which may be of a step before."""
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
    (Path(folder) / RECORD_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _chosen(args: MFNTrainingArguments) -> dict[str, Any]:
    """What was set, and all that is MFN's own. Places and secrets stay out, as does what may name a place."""
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

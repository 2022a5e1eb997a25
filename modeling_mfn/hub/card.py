"""The model card of an MFN model, filled from the files of its folder. A figure that is in no file is called missing.

`card_template.md` holds the words and the tables. Text of other people reaches it only through the filters below.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, StrictUndefined

from ..features.atlas.belonging import check_model
from ..features.atlas.schema import FOLDER
from ..features.atlas.storage import read_metadata
from ..model.configuration_mfn import MFNConfig
from ..model.feature_names import format_feature, is_among
from ..model.interventions import Ablate, Clamp, Intervention, write_intervention
from ..training.record import TrainingRecord, read_record
from ..utils.display import for_table_cell, visible
from ..utils.files import read_json
from .atlas_summary import AtlasSummary, read_atlas
from .evaluation_file import is_number, perplexity_names, read_perplexities

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).with_name("card_template.md")
TAGS = ["mfn", "interpretability", "sparse-autoencoder", "monosemanticity", "steering"]
MAX_FEATURES, MAX_TOKENS = 50, 5
"""Rows of the card's table of features, and promoted tokens per row, at most."""
DATASET_ID = re.compile(r"[^/]+/[^/]+(?<!\.txt)(?<!\.json)(?<!\.jsonl)(?<!\.parquet)(?<!\.csv)")
"""`owner/name` of a data set on the Hub. A name with one of these suffixes is a file."""
NOT_SHOWN = ("epoch", "step", "total_flos", "runtime", "per_second", "grad_norm", "learning_rate")
"""Ends of names of logged figures that describe the run, not the model."""


def model_card(
    folder: str | os.PathLike[str],
    repository: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    about: str = "",
) -> ModelCard:
    """Makes the card of the MFN model in a folder. The weights are not read.

    Args:
        folder: Folder with `config.json` and, where they exist, `features/`, `evaluation.json` and
            `training_record.json`.
        repository: Id of the model on the Hub. Default: the name of the folder.
        base_model: Id on the Hub of the model that was converted. Default: the one in the config.
        license: License of the model as the Hub writes it, for instance `apache-2.0`.
        about: Your own Markdown, put before the rest.

    Returns:
        The card; `write_card` saves it.

    Raises:
        ValueError: If a file is damaged, or the folder has no config of an MFN model. Also if the atlas or
            `evaluation.json` is of other weights.
    """
    folder = Path(folder)
    config = read_config(folder)
    repository = repository or folder.resolve().name
    base_model = base_model or base_of(config)
    if base_model is not None:
        validate_repo_id(base_model)
    perplexities = read_perplexities(folder)
    atlas = read_atlas(folder)
    if atlas is not None:
        check_model(read_metadata(folder / FOLDER), config, str(folder), whole=True)
    atlas = _without_pruned(atlas, config)
    record = read_record(folder)
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        tags=TAGS,
        datasets=_dataset_ids(atlas) or None,
        model_name=repository.rpartition("/")[2],
        eval_results=_eval_results(perplexities, atlas) or None,
    )
    filled = (
        _environment()
        .from_string(TEMPLATE.read_text(encoding="utf-8"))
        .render(
            card_data=data.to_yaml(),
            title=repository.rpartition("/")[2],
            repository=repository,
            base_model=base_model,
            license=license,
            about=about,
            config=config,
            has_tokenizer=(folder / "tokenizer_config.json").is_file(),
            steering=_steering(config, atlas),
            presets=list(getattr(config, "steering_presets", None) or {}),
            atlas=atlas,
            perplexities=perplexities,
            perplexity_names=perplexity_names(perplexities),
            training=_training_facts(record),
            logged=_logged_figures(record),
            MAX_FEATURES=MAX_FEATURES,
            MAX_TOKENS=MAX_TOKENS,
        )
    )
    return ModelCard(filled)


def write_card(folder: str | os.PathLike[str], card: ModelCard) -> None:
    """Writes the card as the folder's `README.md`. An older card stays until the new one is complete."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".card-") as scratch:
        card.save(Path(scratch) / CARD_FILE)
        os.replace(Path(scratch) / CARD_FILE, Path(folder) / CARD_FILE)


def read_config(folder: Path) -> MFNConfig:
    """Reads the config of the MFN model in a folder; raises `ValueError` if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one that `save_pretrained` wrote")
    config = read_json(folder / "config.json", dict[str, Any])
    if config is None:
        raise ValueError(f"{folder} has no config.json; give a folder that `save_pretrained` wrote")
    if config.get("model_type") != "mfn":
        raise ValueError(f"{folder} holds a model of type {config.get('model_type')!r}; it must be an MFN model")
    return MFNConfig.from_pretrained(folder)


def base_of(config: MFNConfig) -> str | None:
    """Returns the id on the Hub of the model that was converted; None if the config names none, or a local folder."""
    name = config.text_config._name_or_path
    return name if name and _is_id(name) and not os.path.exists(name) else None


def _is_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


# filters of the template


def _code(text: str, width: int = 80) -> str:
    return f"<code>{for_table_cell(text, width)}</code>"


def _environment() -> Environment:
    """Jinja with the filters that make a value safe to stand in Markdown: `cell`, `code`, `python` and `number`."""
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "cell": lambda value: for_table_cell(str(value)),
        "code": _code,
        "python": lambda text: json.dumps(visible(text), ensure_ascii=False),
        "number": lambda value: f"{value:,.4g}" if is_number(value) else "",
        "whole": lambda value: f"{value:,}" if is_number(value) else "",
        "percent": lambda value: f"{value:.2%}" if is_number(value) else "",
        "perplexity_title": _perplexity_title,
    }
    return environment


def _perplexity_title(name: str) -> str:
    return "base model" if name == "base" else name.replace("_", " ")


# metadata for the Hub


def _dataset_ids(atlas: AtlasSummary | None) -> list[str]:
    """Texts of the atlas that are data sets on the Hub, without their configs."""
    names = [source.partition(":")[0] for source in (atlas.sources if atlas else [])]
    return sorted({name for name in names if DATASET_ID.fullmatch(name) and _is_id(name) and not os.path.exists(name)})


def _eval_results(perplexities: list[dict[str, Any]], atlas: AtlasSummary | None) -> list[EvalResult]:
    results = [
        _eval_result(row["data"], "perplexity", row[name], f"perplexity, {_perplexity_title(name)}")
        for row in perplexities
        for name in perplexity_names([row])
    ]
    if atlas is not None:
        data = ", ".join(atlas.sources) or "data of the atlas"
        results += [
            _eval_result(data, name, value, f"{name.replace('_', ' ')}, block {layer}")
            for layer, figures in atlas.layers.items()
            for name, value in figures.items()
        ]
    return results


def _eval_result(data: str, kind: str, value: float, name: str) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name=visible(data),
        dataset_config=visible(data),  # the Hub tells results apart by type and config, not by name
        metric_type=kind,
        metric_value=value,
        metric_name=name,
    )


# values for the text


def _without_pruned(atlas: AtlasSummary | None, config: MFNConfig) -> AtlasSummary | None:
    """Leaves out labelled features that were pruned before or after the atlas was made. They cannot be steered."""
    if atlas is None:
        return None
    there = [feature for feature in atlas.labelled if not is_among(feature.name, config.pruned_features)]
    return atlas._replace(labelled=there)


def _steering(config: MFNConfig, atlas: AtlasSummary | None) -> str:
    """Interventions of the card's example, as JSON: on labelled features where there are any, else on one feature."""
    labelled = [feature for feature in (atlas.labelled if atlas else []) if feature.max_activation][:2]
    if labelled:
        first, *rest = labelled
        clamped: dict[str, Intervention] = {first.name: Clamp(float(f"{first.max_activation:.3g}"))}
        return _as_json(clamped | {feature.name: Ablate() for feature in rest})
    present = (
        format_feature(layer, index)
        for layer in reversed(config.layers)
        for index in range(config.num_features)
        if not is_among((layer, index), config.pruned_features)
    )
    return _as_json({name: Clamp(4.0) for name in [next(present, None)] if name})


def _as_json(interventions: dict[str, Intervention]) -> str:
    return json.dumps({name: write_intervention(each) for name, each in interventions.items()})


def _training_facts(record: TrainingRecord | None) -> list[tuple[str, Any]]:
    """Name and value of all that the training record says, without figures."""
    if record is None:
        return []
    facts = [
        ("optimizer steps", f"{record.steps} of {record.planned_steps} planned"),
        ("tokens", record.tokens),
        *((name, getattr(record, name)) for name in ("processes", "alpha", "k")),
        *((f"version of {name}", value) for name, value in record.versions.items()),
        *sorted(record.arguments.items()),
    ]
    return [(name, value) for name, value in facts if value is not None]


def _logged_figures(record: TrainingRecord | None) -> list[tuple[str, float]]:
    return [
        (name, value)
        for name, value in sorted(record.figures.items() if record else ())
        if is_number(value) and not name.endswith(NOT_SHOWN)
    ]


__all__ = ["CARD_FILE", "base_of", "model_card", "read_config", "write_card"]

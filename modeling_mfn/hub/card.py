"""The model card of an MFN model, from the files of its folder. A figure that no file has is said to be missing.

`evaluation.json`, where there is one, holds perplexities of the base model and at some alphas:
`{"perplexity": [{"data": "what text", "tokens": 4096, "base": 40.6, "alpha_0": 40.6, "alpha_1": 54.2}]}`.
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

from ..model.configuration_mfn import MFNConfig
from ..model.feature_names import format_feature, is_among
from ..model.interventions import Ablate, Clamp, Intervention, write_intervention
from ..training.record import RECORD_FILE
from ..utils.display import for_table_cell, markdown_table, visible
from ..utils.files import read_json
from .atlas_summary import AtlasSummary, LabelledFeature, read_atlas
from .evaluation_file import EVALUATION_FILE, _is_number, _perplexity_names, _read_evaluation

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).with_name("card_template.md")


TAGS = ["mfn", "interpretability", "sparse-autoencoder", "monosemanticity", "steering"]


SHOWN_FEATURES, SHOWN_TOKENS = 50, 5
"""Most rows of the card's table of features, and promoted tokens in each."""


DATASET = re.compile(r"[^/]+/[^/]+(?<!\.txt)(?<!\.json)(?<!\.jsonl)(?<!\.parquet)(?<!\.csv)")
"""What can be a data set of somebody on the Hub; a suffix says file."""


PASSING = ("epoch", "step", "total_flos", "runtime", "per_second", "grad_norm", "learning_rate")
"""Figures of the training record that say nothing about the model, by the ends of their names."""


def model_card(
    folder: str | os.PathLike[str],
    repository: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    about: str = "",
) -> ModelCard:
    """The card of the MFN model in a folder, of which the weights are not read.

    Args:
        folder: with `config.json`, and what there is of `features/`, `evaluation.json` and `training_record.json`.
        repository: the model's id on the Hub; by default the name of the folder.
        base_model: id on the Hub of the model that was converted; by default what the config says.
        license: of the model, as the Hub writes it: `apache-2.0`.
        about: Markdown of your own, that stands first.

    Raises:
        ValueError: if one of the files is damaged, or the folder has no config of an MFN model.
    """
    folder = Path(folder)
    config = read_config(folder)
    repository = repository or folder.resolve().name
    base_model = base_model or base_of(config)
    if base_model is not None:
        validate_repo_id(base_model)
    evaluation = _read_evaluation(folder / EVALUATION_FILE)
    record = read_json(folder / RECORD_FILE) or {}
    atlas = _without_pruned(read_atlas(folder), config)
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        tags=TAGS,
        datasets=_dataset_ids(atlas) or None,
        model_name=repository.rpartition("/")[2],
        eval_results=_eval_results(evaluation, atlas) or None,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=for_table_cell(repository.rpartition("/")[2]),
        repository=json.dumps(visible(repository), ensure_ascii=False),
        base=f"[{base_model}](https://huggingface.co/{base_model})" if base_model else _unnamed_base(config),
        where=_where(config),
        reader="the residual stream" if config.blend_into == "residual" else "the MLP's input",
        about=about,
        architecture=_architecture(config),
        has_tokenizer=(folder / "tokenizer_config.json").is_file(),
        tokenizer_of=json.dumps(base_model or "the base model"),
        steering=_steering(config, atlas),
        presets=", ".join(
            f"<code>{for_table_cell(name)}</code>" for name in getattr(config, "steering_presets", None) or {}
        ),
        alpha_note=_alpha_note(config),
        features=_features(atlas),
        perplexities=_perplexities(evaluation),
        atlas_figures=_atlas_figures(atlas),
        training=_training(record),
        limits=["The license of the base model is not known here; it holds for this model, too."]
        if not license
        else [],
        gaps=_gaps(evaluation, atlas, record),
    )


def write_card(folder: str | os.PathLike[str], card: ModelCard) -> None:
    """Writes the card as the folder's `README.md`, beside an older one, which it then replaces."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".card-") as scratch:
        card.save(Path(scratch) / CARD_FILE)
        os.replace(Path(scratch) / CARD_FILE, Path(folder) / CARD_FILE)


def read_config(folder: Path) -> MFNConfig:
    """The config of the MFN model in a folder; `ValueError` if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one that `save_pretrained` wrote")
    config = read_json(folder / "config.json")
    if config is None:
        raise ValueError(f"{folder} has no config.json; give a folder that `save_pretrained` wrote")
    if config.get("model_type") != "mfn":
        raise ValueError(f"{folder} holds a model of type {config.get('model_type')!r}; it must be an MFN model")
    return MFNConfig.from_pretrained(folder)


def base_of(config: MFNConfig) -> str | None:
    """The id on the Hub of the model that was converted, where the config holds one."""
    name = config.text_config._name_or_path
    return name if name and _is_id(name) and not os.path.exists(name) else None


def _is_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _perplexity_title(name: str) -> str:
    return "base model" if name == "base" else name.replace("_", " ")


def _number(value: Any) -> str:
    return f"{value:,.4g}" if _is_number(value) else ""


# metadata


def _dataset_ids(atlas: AtlasSummary | None) -> list[str]:
    """Sources of the atlas that are data sets on the Hub, without their configs; files and folders are none."""
    names = [source.partition(":")[0] for source in (atlas.sources if atlas else [])]
    return sorted({name for name in names if DATASET.fullmatch(name) and _is_id(name) and not os.path.exists(name)})


def _eval_results(evaluation: list[dict[str, Any]], atlas: AtlasSummary | None) -> list[EvalResult]:
    def result(data: str, kind: str, value: float, name: str) -> EvalResult:
        return EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=visible(data),
            dataset_config=visible(data),  # results are told apart by type and config, not by name
            metric_type=kind,
            metric_value=value,
            metric_name=name,
        )

    perplexities = [
        result(row["data"], "perplexity", row[name], f"perplexity, {_perplexity_title(name)}")
        for row in evaluation
        for name in _perplexity_names([row])
    ]
    if atlas is None:
        return perplexities
    data = ", ".join(atlas.sources) or "data of the atlas"
    return perplexities + [
        result(data, name, value, f"{name.replace('_', ' ')}, block {layer}")
        for layer, figures in atlas.layers.items()
        for name, value in figures.items()
    ]


# text


def _unnamed_base(config: MFNConfig) -> str:
    return f"A {for_table_cell(config.text_config.model_type)} model, whose name this checkpoint does not hold,"


def _where(config: MFNConfig) -> str:
    blocks = config.num_hidden_layers
    return (
        f"each of the {blocks} blocks" if len(config.layers) == blocks else f"{len(config.layers)} of {blocks} blocks"
    )


def _architecture(config: MFNConfig) -> str:
    rows = [
        ("blocks with an MFN layer, from 0", ", ".join(map(str, config.layers))),
        ("features of each, m", f"{config.num_features:,}"),
        ("hidden size, d", f"{config.hidden_size:,}"),
        ("active features a token, K, at most", config.k),
        ("blend, alpha", f"{config.alpha:g}"),
        ("what the blend replaces, `blend_into`", config.blend_into),
        ("what is encoded, `input_norm`", config.input_norm),
        ("`decoder_bias`, `shared_decoder`", f"{config.decoder_bias}, {config.shared_decoder}"),
    ]
    return markdown_table(("MFN layers", ""), rows)


def _steering(config: MFNConfig, atlas: AtlasSummary | None) -> str:
    """Interventions for the example: on labelled features where there are any."""
    labelled = [feature for feature in (atlas.labelled if atlas else []) if feature.max_activation][:2]
    if not labelled:
        there = (
            _example({format_feature(layer, index): Clamp(4.0)})
            for layer in reversed(config.layers)
            for index in range(config.num_features)
            if not is_among((layer, index), config.pruned_features)
        )
        return next(there, "")
    first, *rest = labelled
    clamped = {first.name: Clamp(float(f"{first.max_activation:.3g}"))}
    return _example(clamped | {feature.name: Ablate() for feature in rest})


def _example(interventions: dict[str, Intervention]) -> str:
    """What stands between the braces: JSON, so that it needs no import."""
    return json.dumps({name: write_intervention(each) for name, each in interventions.items()})[1:-1]


def _without_pruned(atlas: AtlasSummary | None, config: MFNConfig) -> AtlasSummary | None:
    """Without the labelled features that are pruned, when the atlas was made or since: none can be steered."""
    if atlas is None:
        return None
    there = [feature for feature in atlas.labelled if not is_among(feature.name, config.pruned_features)]
    return atlas._replace(labelled=there)


def _alpha_note(config: MFNConfig) -> str:
    if config.alpha == 0:
        return (
            "At alpha 0, as saved, the model is its base and reads no feature, so that steering has no effect: "
            "`model.set_blend(1.0)` first."
        )
    if config.alpha < 1:
        return f"At alpha {config.alpha:g}, as saved, an intervention counts as far as the model reads its features."
    reader = "everything after an MFN layer" if config.blend_into == "residual" else "the MLP after an MFN layer"
    return f"At alpha 1, as saved, {reader} reads its features alone."


def _features(atlas: AtlasSummary | None) -> str:
    if atlas is None:
        return "This repository has no atlas of its features."
    seen = f" of {atlas.tokens:,} tokens" if atlas.tokens else ""
    about = f"`features/` holds an atlas{seen}; `FeatureAtlas.from_pretrained` downloads it alone."
    if not atlas.labelled:
        return f"{about} No feature has a label yet."
    shown = atlas.labelled[:SHOWN_FEATURES]
    header = ("feature", "label", "from", "score", "firing rate", "largest activation", "promotes")
    count = f"{len(atlas.labelled):,} features have a label" + (
        f"; the first {len(shown)}:" if len(shown) < len(atlas.labelled) else ":"
    )
    return f"{about} {count}\n\n{markdown_table(header, map(_feature_row, shown))}"


def _feature_row(feature: LabelledFeature) -> tuple[str, ...]:
    rate = f"{feature.firing_rate:.2%}" if _is_number(feature.firing_rate) else ""
    tokens = " ".join(f"<code>{for_table_cell(token, 20)}</code>" for token in feature.promoted_tokens[:SHOWN_TOKENS])
    return (
        for_table_cell(feature.name),
        for_table_cell(feature.label),
        for_table_cell(feature.source),
        _number(feature.score),
        rate,
        _number(feature.max_activation),
        tokens,
    )


def _perplexities(evaluation: list[dict[str, Any]]) -> str:
    if not evaluation:
        return f"Perplexities: none are recorded (`{EVALUATION_FILE}`)."
    names = _perplexity_names(evaluation)
    rows = [
        (
            for_table_cell(row["data"]),
            f"{row['tokens']:,}" if _is_number(row.get("tokens")) else "",
            *(_number(row.get(name)) for name in names),
        )
        for row in evaluation
    ]
    return "Perplexity over next tokens, natural logarithm:\n\n" + markdown_table(
        ("text", "tokens", *map(_perplexity_title, names)), rows
    )


def _atlas_figures(atlas: AtlasSummary | None) -> str:
    if atlas is None or not atlas.layers:
        return "Firing rates and dead features: none are recorded (`features/atlas.json`)."
    names = list(dict.fromkeys(name for figures in atlas.layers.values() for name in figures))
    rows = [(layer, *(_number(figures.get(name)) for name in names)) for layer, figures in atlas.layers.items()]
    data = for_table_cell(", ".join(atlas.sources)) or "data that the atlas does not name"
    header = ("block", *(for_table_cell(name.replace("_", " ")) for name in names))
    return f"Features on {data}:\n\n{markdown_table(header, rows)}"


def _training(record: dict[str, Any]) -> str:
    if not record:
        return f"How the MFN layers were trained is not recorded (`{RECORD_FILE}`)."
    facts = [
        ("optimizer steps", f"{record.get('steps')} of {record.get('planned_steps')} planned"),
        ("tokens", record.get("tokens")),
        *((name, record.get(name)) for name in ("processes", "alpha", "k")),
        *((f"version of {name}", value) for name, value in record.get("versions", {}).items()),
        *sorted(record.get("arguments", {}).items()),
    ]
    figures = {
        name: value
        for name, value in sorted(record.get("figures", {}).items())
        if _is_number(value) and not name.endswith(PASSING)
    }
    rows = [(for_table_cell(str(name)), for_table_cell(str(value))) for name, value in facts if value is not None]
    text = f"From `{RECORD_FILE}`:\n\n{markdown_table(('', ''), rows)}"
    if figures:
        logged = [(for_table_cell(name), _number(value)) for name, value in figures.items()]
        text += f"\n\nLast logged:\n\n{markdown_table(('figure', ''), logged)}"
    return text


def _gaps(evaluation: list[dict[str, Any]], atlas: AtlasSummary | None, record: dict[str, Any]) -> list[str]:
    gaps = ["whether features have one meaning each, and what steering does beside what it is meant to do"]
    if not any("base" in row and "alpha_1" in row for row in evaluation):
        gaps.append("how close the model at alpha 1 comes to its base")
    if atlas is None:
        gaps.append("how often each feature fires, on what, and how many are dead")
    elif not atlas.labelled:
        gaps.append("what any feature stands for")
    if not record:
        gaps.append("how the MFN layers were trained")
    return gaps

"""The verb `mfn evaluate`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..utils.extras import needs
from ..utils.files import check_space
from .inputs import load_mfn, read_config, read_tokenizer, with_finite_weights
from .options import console

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from ..evaluation.baselines.models import BaselineModels
    from ..evaluation.predictions.p5_transfer import Transfer
    from ..evaluation.study import Evidence
    from ..features.labelling.concepts import Concepts
    from ..model.mfn_for_causal_lm import MFNForCausalLM

ALL_PREDICTIONS = "P1,P2,P3,P4,P5"
UNEVEN = 2
"""Ratio of training tokens, of MFN models and baselines, above which a note is printed."""


def evaluate(
    model: Annotated[
        list[str], typer.Argument(help="MFN model: a folder, or an id on the Hub. P3 needs models of several seeds.")
    ],
    text: Annotated[
        list[str],
        typer.Option(
            "--text",
            help="Held-out text as TEXT or DOMAIN=TEXT, with TEXT as in mfn train. May be repeated. Must not be text "
            "that a model was trained on.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for results, report, figures and baselines.")] = Path(
        "evaluation"
    ),
    predictions: Annotated[str, typer.Option(help="Predictions to measure.")] = ALL_PREDICTIONS,
    base: Annotated[
        str | None, typer.Option(help="Base model on which to train the baselines: post-hoc SAEs and random SAEs.")
    ] = None,
    train_text: Annotated[
        list[str] | None,
        typer.Option("--train-text", help="Text that baselines learn from, the training text of MODEL."),
    ] = None,
    no_rate: Annotated[
        list[str] | None, typer.Option("--no-rate", help="For P1: MODEL trained without the rate loss.")
    ] = None,
    concepts: Annotated[
        list[Path] | None,
        typer.Option(
            help="For P2: JSON file of concepts, {name: [word, ...]}. May be repeated. Each file is a group, and "
            "groups count alike.",
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="For P5: the DOMAIN of --train-text that MODEL and the SAEs learn from.")
    ] = None,
    dense: Annotated[
        list[str] | None,
        typer.Option("--dense", help="For P5: BASE trained on without MFN layers, as long as each MODEL."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens to measure on, of each text.")] = 65_536,
    train_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that baselines learn from, in all. Give as many as MODEL had.")
    ] = 300_000,
    epochs: Annotated[int, typer.Option(min=1, help="Passes of baselines through these tokens.")] = 1,
    window: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of samples and intervals.")] = 0,
) -> None:
    """Measure the paper's five predictions, with intervals and baselines.

    Results of an earlier run with the same options are kept. Perplexities on each text go into evaluation.json next to
    the weights of each MODEL that is a folder: of BASE, at alpha 0 and at the model's alpha. mfn push puts them into
    the model card.

    Example: mfn evaluate gpt2-mfn gpt2-mfn-seed-1 --text news=held-out.txt --base gpt2 --train-text news=corpus.txt
    """
    with needs("evaluate"):
        from ..evaluation.report import verdict_table
        from ..evaluation.study import check_predictions, measure_predictions

    chosen = check_predictions([name.strip().upper() for name in predictions.split(",")])
    options = _Options(
        model, _named_texts(text), output, base, _named_texts(train_text or []), no_rate or [], _named_groups(concepts),
        source, dense or [], tokens, train_tokens, epochs, window, seed,
    )  # fmt: skip
    _check(options, chosen)
    texts = _read_texts(options)
    models = _load_models(options)
    baselines = _baselines(options, models.mfn[0], texts.training)
    settings = _settings(options, texts, models, baselines)
    evidence = _evidence(options, chosen, texts, models, baselines)
    results = measure_predictions(evidence, chosen, settings, output)
    _write_perplexities(options, texts, models, baselines)
    console.print(verdict_table(results))
    console.print(f"results, report and figures are in {output}", markup=False)


@dataclass(frozen=True)
class _Options:
    """Options of the command."""

    models: list[str]
    texts: dict[str, str]
    output: Path
    base: str | None
    train_texts: dict[str, str]
    no_rate: list[str]
    groups: dict[str, Concepts]
    source: str | None
    dense: list[str]
    tokens: int
    train_tokens: int
    epochs: int
    window: int
    seed: int


class _Texts(NamedTuple):
    """Windows of each domain."""

    held_out: dict[str, Dataset]
    training: dict[str, Dataset]


class _Models(NamedTuple):
    """Models in float32, the precision of the baselines."""

    mfn: list[MFNForCausalLM]
    no_rate: list[MFNForCausalLM]
    dense: list[PreTrainedModel]
    tokenizer: Any


def _named_texts(texts: Sequence[str]) -> dict[str, str]:
    """Returns texts by domain, from `DOMAIN=TEXT`, or from `TEXT` with its file name as the domain."""
    named: dict[str, str] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals or Path(text).exists():
            name, source = Path(text).stem, text
        if not name or not source:
            raise ValueError(f"{text!r} is not a text; write DOMAIN=TEXT, or a text alone")
        if name in named:
            raise ValueError(f"two texts are of domain {name!r}; give them other names, as DOMAIN=TEXT")
        named[name] = source
    return named


def _named_groups(files: Sequence[Path] | None) -> dict[str, Concepts]:
    """Returns groups of concepts by the names of their files."""
    from ..evaluation.measures.tasks import FORMATTING
    from ..features.labelling.concepts import read_concepts

    groups: dict[str, Concepts] = {}
    for file in files or []:
        if file.stem in groups or file.stem == FORMATTING:
            raise ValueError(f"concepts are of {file}, but there is a group {file.stem!r}; give the file another name")
        groups[file.stem] = read_concepts(file)
    return groups


def _check(options: _Options, chosen: Sequence[str]) -> None:
    """Checks options against each other and models against models, before anything is read."""
    from ..evaluation.comparable import check_alike
    from ..evaluation.measures.intervention_effects import least_window
    from ..evaluation.predictions.p4_interventions import LATER_TOKENS

    output, window = options.output, options.window
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; the output must be a folder")
    for folder in (output, *filter(Path.is_dir, map(Path, options.models))):  # perplexities go next to the weights
        check_space(folder)
    if options.base is not None and not options.train_texts:
        raise ValueError("base is given without train-text; baselines need text to learn from")
    if options.dense and options.source is None:
        raise ValueError("dense is given without source; it stands for what BASE learns of that domain, in P5")
    if options.source is not None:
        _check_transfer(options, options.source)
    if "P4" in chosen and window < (least := least_window(LATER_TOKENS)):
        raise ValueError(f"window is {window}; P4 needs {least} tokens or more, {LATER_TOKENS} of them after a change")
    for each in [*options.models, *options.no_rate]:
        read_config(each)
    check_alike(options.models, options.no_rate, options.base, options.dense, window)


def _check_transfer(options: _Options, source: str) -> None:
    texts, train_texts, dense = options.texts, options.train_texts, options.dense
    if options.base is None:
        raise ValueError("source is given without base; P5 compares with SAEs of the base model")
    for name, given in {"text": texts, "train-text": train_texts}.items():
        if source not in given:
            raise ValueError(f"source is {source!r}; {name} has {', '.join(given)}")
    missing = [name for name in texts if name not in train_texts]
    if missing or len(texts) < 2:
        raise ValueError(
            f"text has {', '.join(texts)} and train-text {', '.join(train_texts)}; P5 needs at least two domains, each "
            "with train-text for the SAEs that are fine-tuned on it"
        )
    if dense and len(dense) != len(options.models):
        raise ValueError(
            f"there are {len(dense)} dense models and {len(options.models)} MFN models; give one for each, or none"
        )


def _read_texts(options: _Options) -> _Texts:
    from ..evaluation.comparable import check_held_out

    tokenizer, window = read_tokenizer(options.models[0]), options.window
    # with a source, one training reads one domain; otherwise it reads an equal share of each
    share = options.train_tokens // (1 if options.source else max(1, len(options.train_texts)))
    texts = _Texts(
        {name: read_windows(text, tokenizer, window, options.tokens) for name, text in options.texts.items()},
        {name: read_windows(text, tokenizer, window, share) for name, text in options.train_texts.items()},
    )
    check_held_out(*texts, window)
    return texts


def read_windows(text: str, tokenizer: Any, window: int, tokens: int) -> Dataset:
    """Reads the first tokens of a text, in windows."""
    from datasets import Dataset

    from ..data.text import load_text, pack

    rows = pack(load_text([text]), tokenizer, window)
    return Dataset.from_list(list(islice(rows, max(1, tokens // window))))


def _load_models(options: _Options) -> _Models:
    import torch
    from transformers import AutoModelForCausalLM

    return _Models(
        [load_mfn(each, dtype=torch.float32) for each in options.models],
        [load_mfn(each, dtype=torch.float32) for each in options.no_rate],
        [
            with_finite_weights(AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32), each)
            for each in options.dense
        ],
        read_tokenizer(options.models[0]),
    )


def _baselines(options: _Options, like: MFNForCausalLM, training: Mapping[str, Dataset]) -> BaselineModels | None:
    """Returns baselines with the place and size of an MFN model, or `None` without --base."""
    from datasets import concatenate_datasets

    from ..evaluation.baselines.models import BaselineModels

    if options.base is None:
        return None
    names = (
        "layers",
        "num_features",
        "k",
        "input_norm",
        "decoder_bias",
        "codes",
        "coding_rounds",
        "refine_steps",
        "blend_into",
    )

    def rows(domain: str | None, seed: int) -> Dataset:
        windows = training if domain is None else {domain: training[domain]}
        return concatenate_datasets(list(windows.values())).shuffle(seed=seed)

    size = {name: getattr(like.config, name) for name in names}
    return BaselineModels(options.base, rows, size, options.epochs, options.output / "baselines")


def _settings(options: _Options, texts: _Texts, models: _Models, baselines: BaselineModels | None) -> dict[str, Any]:
    """Returns everything that results depend on. A result is kept for a run with the same settings."""
    from .. import __version__
    from ..evaluation.baselines.models import digest_of, digest_of_rows
    from ..evaluation.comparable import tokens_of

    learnt = [tokens_of(each) for each in options.models]
    if baselines is not None:
        _note_uneven(options, texts.training, learnt)
    mfn = [*models.mfn, *models.no_rate]
    groups = json.dumps(options.groups, sort_keys=True)
    return {
        "modeling_mfn": __version__, "models": options.models, "learnt_from_tokens": learnt,
        "no_rate": options.no_rate, "alpha": [each.config.alpha for each in mfn], "k": models.mfn[0].config.k,
        "base": options.base, "dense": options.dense, "source": options.source,
        "text": options.texts, "train_text": options.train_texts, "concepts": list(options.groups),
        "tokens": options.tokens, "train_tokens": options.train_tokens, "epochs": options.epochs,
        "window": options.window, "seed": options.seed,
        # a file can change under its name
        "digests": [
            *([] if baselines is None else [baselines.base_digest]),
            *map(digest_of, [*mfn, *models.dense]),
            *map(digest_of_rows, [*texts.held_out.values(), *texts.training.values()]),
            hashlib.sha256(groups.encode()).hexdigest()[:16],
        ],
    }  # fmt: skip


def _note_uneven(options: _Options, training: Mapping[str, Dataset], learnt: Sequence[int | None]) -> None:
    """Prints a note if baselines learn from far more, or far fewer, tokens than a model did."""
    rows = len(training[options.source]) if options.source else sum(map(len, training.values()))
    read = options.epochs * options.window * rows
    if uneven := [known for known in learnt if known and not 1 / UNEVEN < read / known < UNEVEN]:
        note = f"a model learnt from {uneven[0]:,} tokens, and baselines learn from {read:,}"
        console.print(f"{note}: --train-tokens and --epochs set how many", markup=False)


def _evidence(
    options: _Options, chosen: Sequence[str], texts: _Texts, models: _Models, baselines: BaselineModels | None
) -> Evidence:
    """Returns the study's evidence. Trains the baselines that are not there yet."""
    from datasets import concatenate_datasets

    from ..evaluation.result import MFN, NO_RATE_LOSS
    from ..evaluation.study import Evidence

    subjects: dict[str, Sequence[MFNForCausalLM]] = {MFN: models.mfn}
    transfers: Mapping[str, Sequence[Transfer]] = {}
    if models.no_rate:
        subjects[NO_RATE_LOSS] = models.no_rate
    if baselines is not None:
        source = options.source if "P5" in chosen else None
        stand_ins = None if source is None or models.dense else _frozen(baselines.base_model, models.mfn)
        subjects |= baselines.subjects(len(models.mfn), options.source)
        if source is not None:
            targets = [name for name in texts.held_out if name != source]
            transfers = baselines.transfers(source, targets, models.mfn, stand_ins or models.dense)
    most = options.tokens // options.window
    other = [rows.select(range(min(len(rows), most))) for rows in texts.training.values()]
    return Evidence(
        subjects=subjects,
        held_out=texts.held_out,
        tokenizer=models.tokenizer,
        choosing=concatenate_datasets(other) if other else None,
        groups=options.groups,
        transfers=transfers,
        seed=options.seed,
    )


def _frozen(base: PreTrainedModel, models: Sequence[MFNForCausalLM]) -> list[None]:
    """Returns `None` as the dense counterpart of each model, which stands for the model at alpha = 0.

    Raises:
        ValueError: if the backbone of a model was trained, so that a dense counterpart is needed.
    """
    import torch

    weights = base.base_model.state_dict()
    for number, model in enumerate(models, start=1):
        own = model.model.backbone.state_dict()
        if any(not torch.equal(own[name], weight.to(own[name])) for name, weight in weights.items()):
            raise ValueError(
                f"the backbone of model {number} is not that of {base.name_or_path}: it was trained, too; give "
                "--dense, a model without MFN layers that was trained as long"
            )
    return [None] * len(models)


def _write_perplexities(options: _Options, texts: _Texts, models: _Models, baselines: BaselineModels | None) -> None:
    """Writes perplexities into the `evaluation.json` of each model that is a folder."""
    from ..evaluation.measures.perplexity import perplexity_rows
    from ..hub.evaluation_file import add_perplexities

    base = None if baselines is None else baselines.base_model
    for name, each in zip(options.models, models.mfn, strict=True):
        if Path(name).is_dir():
            add_perplexities(name, perplexity_rows(each, base, texts.held_out))


__all__ = ["evaluate", "read_windows"]

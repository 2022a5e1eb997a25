"""The verb `mfn evaluate`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from ..evaluation.baselines.models import BaselineModels
    from ..evaluation.predictions.p5_transfer import Transfer
    from ..evaluation.result import PredictionResult
    from ..features.labelling.concepts import Concepts
    from ..model.modeling_mfn import MFNForCausalLM

ALL = "P1,P2,P3,P4,P5"


def evaluate(
    model: Annotated[
        list[str], typer.Argument(help="MFN model: a folder, or an id on the Hub; for P3 those of several seeds.")
    ],
    text: Annotated[
        list[str],
        typer.Option(
            "--text",
            help="Held-out text, as --text of train, or DOMAIN=TEXT; may be given several times. Never text that a "
            "model was trained on.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for results, report, figures and baselines.")] = Path(
        "evaluation"
    ),
    predictions: Annotated[str, typer.Option(help="Which of the five to measure.")] = ALL,
    base: Annotated[
        str | None, typer.Option(help="Base model, to train the baselines on: post-hoc SAEs and a random one.")
    ] = None,
    train_text: Annotated[
        list[str] | None,
        typer.Option("--train-text", help="Text that baselines learn from, as MODEL did."),
    ] = None,
    no_rate: Annotated[
        list[str] | None, typer.Option("--no-rate", help="For P1: the same model trained without the rate loss.")
    ] = None,
    concepts: Annotated[
        list[Path] | None,
        typer.Option(
            help="For P2: JSON file of concepts, {name: [word, ...]}; may be given several times, each a group that "
            "counts as much as another.",
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="For P5: the one DOMAIN of --train-text that MODEL and SAEs learn from.")
    ] = None,
    dense: Annotated[
        list[str] | None,
        typer.Option("--dense", help="For P5: BASE trained on as long as each MODEL, without MFN layers."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens to measure on, of each text.")] = 65_536,
    train_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that baselines learn from, in all: as many as MODEL did.")
    ] = 300_000,
    epochs: Annotated[int, typer.Option(min=1, help="Times that they go through them.")] = 1,
    window: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 128,
    seed: Annotated[int, typer.Option(help="Of samples and intervals.")] = 0,
) -> None:
    """Measure the paper's five predictions, with intervals and beside baselines.

    What is in the output folder from an earlier run with the same options is taken as it is. Perplexities on each text,
    of BASE, at alpha 0 and at the model's alpha, go into evaluation.json beside the weights of each MODEL that is a
    folder; mfn push puts them into the model card.

    Example: mfn evaluate gpt2-mfn gpt2-mfn-seed-1 --text news=held-out.txt --base gpt2 --train-text news=corpus.txt
    """
    import torch
    from datasets import concatenate_datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .. import __version__
    from ..evaluation.baselines.models import digest_of, digest_of_rows
    from ..evaluation.comparable import check_alike, check_held_out, tokens_of
    from ..evaluation.measures.intervention_effects import least_window
    from ..evaluation.measures.perplexity import perplexity_rows
    from ..evaluation.predictions.p4_interventions import LATER
    from ..evaluation.result import MFN, NO_RATE_LOSS
    from ..evaluation.study import Evidence, check_predictions, measure_predictions
    from ..hub.evaluation_file import add_perplexities
    from ..model.modeling_mfn import MFNForCausalLM

    chosen = check_predictions([name.strip().upper() for name in predictions.split(",")])
    groups = named_groups(concepts or [])
    texts, train_texts = named_texts(text), named_texts(train_text or [])
    _check(texts, train_texts, base, source, dense, len(model), output)
    if "P4" in chosen and window < (least := least_window(LATER)):
        raise ValueError(f"window is {window}; P4 needs {least} tokens or more, as it looks at {LATER} after a change")
    check_alike(model, no_rate or [], base, dense or [], window)
    tokenizer = AutoTokenizer.from_pretrained(model[0])
    held_out = {name: read_windows(part, tokenizer, window, tokens) for name, part in texts.items()}
    share = train_tokens if source else train_tokens // max(1, len(train_texts))  # what one training has of a domain
    training = {name: read_windows(part, tokenizer, window, share) for name, part in train_texts.items()}
    check_held_out(held_out, training, window)
    # of one precision, that of the baselines
    models = [MFNForCausalLM.from_pretrained(each, dtype=torch.float32) for each in model]
    subjects: dict[str, Sequence[MFNForCausalLM]] = {MFN: models}
    if no_rate:
        subjects[NO_RATE_LOSS] = [MFNForCausalLM.from_pretrained(each, dtype=torch.float32) for each in no_rate]
    references = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in dense or []]
    baselines, learnt = None, [tokens_of(each) for each in model]
    if base is not None:
        baselines = _baselines(base, models[0], training, epochs, output / "baselines")
        read = epochs * window * (len(training[source]) if source else sum(map(len, training.values())))
        if uneven := [known for known in learnt if known and not 0.5 < read / known < 2]:
            note = f"there are models that learnt from {uneven[0]:,} tokens, and baselines learn from {read:,}"
            Console().print(f"{note}: --train-tokens and --epochs say from how many", markup=False)
    settings = {
        "modeling_mfn": __version__, "models": model, "learnt_from_tokens": learnt, "no_rate": no_rate or [],
        "alpha": [each.config.alpha for of in subjects.values() for each in of], "k": models[0].config.k,
        "base": base, "dense": dense or [], "source": source,
        "text": texts, "train_text": train_texts, "concepts": list(groups),
        "tokens": tokens, "train_tokens": train_tokens, "epochs": epochs, "window": window, "seed": seed,
        # files may be other ones than they were
        "digests": [
            *([] if baselines is None else [baselines.base_digest]),
            *(digest_of(each) for of in (*subjects.values(), references) for each in of),
            *(digest_of_rows(rows) for rows in (*held_out.values(), *training.values())),
            hashlib.sha256(json.dumps(groups, sort_keys=True).encode()).hexdigest()[:16],
        ],
    }  # fmt: skip
    transfers: Mapping[str, Sequence[Transfer]] = {}
    plain = None
    if baselines is not None:
        plain = baselines.base_model
        learns_source = source if "P5" in chosen else None
        stand_ins = None if references or learns_source is None else _frozen(plain, models)
        subjects |= baselines.subjects(len(models), source)
        if learns_source is not None:
            targets = [name for name in held_out if name != source]
            transfers = baselines.transfers(learns_source, targets, models, stand_ins or references)
    other = {name: rows.select(range(min(len(rows), tokens // window))) for name, rows in training.items()}
    choosing = concatenate_datasets(list(other.values())) if other else None
    evidence = Evidence(subjects, held_out, tokenizer, choosing, groups, transfers, seed)
    results = measure_predictions(evidence, chosen, settings, output)
    for name, each in zip(model, models, strict=True):
        if Path(name).is_dir():
            add_perplexities(name, perplexity_rows(each, plain, held_out))
    Console().print(verdict_table(results))
    Console().print(f"results, report and figures are in {output}", markup=False)


def named_texts(texts: Sequence[str]) -> dict[str, str]:
    """`DOMAIN=TEXT` or `TEXT`, whose domain is the name of its file -> domain -> text."""
    named = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals or Path(text).exists():
            name, source = Path(text).stem, text
        if not name or not source:
            raise ValueError(f"{text!r} is no text; write DOMAIN=TEXT, or a text alone")
        if name in named:
            raise ValueError(f"two texts are of domain {name!r}; give them other names, as DOMAIN=TEXT")
        named[name] = source
    return named


def named_groups(files: Sequence[Path]) -> dict[str, Concepts]:
    """Name of a file, which is that of a group of concepts -> what it holds."""
    from ..evaluation.measures.tasks import FORMATTING
    from ..features.labelling.concepts import read_concepts

    groups: dict[str, Concepts] = {}
    for file in files:
        if file.stem in groups or file.stem == FORMATTING:
            raise ValueError(f"concepts are of {file}, but there is a group {file.stem!r}; give the file another name")
        groups[file.stem] = read_concepts(file)
    return groups


def read_windows(text: str, tokenizer: Any, window: int, tokens: int) -> Dataset:
    """The first so many tokens of a text in windows."""
    from datasets import Dataset

    from ..data.text import load_text, pack

    rows = pack(load_text([text]), tokenizer, window)
    return Dataset.from_list(list(islice(rows, max(1, tokens // window))))


def verdict_table(results: Sequence[PredictionResult]) -> Table:
    """For the terminal: what was found, by which figure, and whether the paper's own criterion is met."""
    table = Table("prediction", "outcome", "because", "the paper's own criterion", show_lines=True)
    for result in results:
        claim, reason, paper = f"{result.prediction} {result.claim}", result.reason, str(result.paper_criterion)
        table.add_row(Text(claim), result.outcome, Text(reason), Text(paper))
    return table


def _check(
    texts: Mapping[str, str],
    train_texts: Mapping[str, str],
    base: str | None,
    source: str | None,
    dense: Sequence[str] | None,
    models: int,
    output: Path,
) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; the output must be a folder")
    if base is not None and not train_texts:
        raise ValueError("base is given without train-text; baselines need text to learn from")
    if dense and source is None:
        raise ValueError("dense is given without source; it stands for what BASE learns of that domain, in P5")
    if source is None:
        return
    if base is None:
        raise ValueError("source is given without base; P5 compares with SAEs of the base model")
    for name, of in {"text": texts, "train-text": train_texts}.items():
        if source not in of:
            raise ValueError(f"source is {source!r}; {name} has {', '.join(of)}")
    missing = [name for name in texts if name not in train_texts]
    if missing or len(texts) < 2:
        raise ValueError(
            f"text has {', '.join(texts)} and train-text {', '.join(train_texts)}; P5 needs at least two domains, each "
            "with train-text for the SAEs that are fine-tuned on it"
        )
    if dense and len(dense) != models:
        raise ValueError(f"there are {len(dense)} dense models and {models} MFN models; give one for each, or none")


def _baselines(
    base: str, like: MFNForCausalLM, training: Mapping[str, Dataset], epochs: int, folder: Path
) -> BaselineModels:
    """Of the place and size of an MFN model."""
    from datasets import concatenate_datasets

    from ..evaluation.baselines.models import BaselineModels

    config = like.config
    size = {
        "layers": config.layers, "num_features": config.num_features, "k": config.k, "input_norm": config.input_norm,
        "decoder_bias": config.decoder_bias, "blend_into": config.blend_into,
    }  # fmt: skip

    def rows(domain: str | None, seed: int) -> Dataset:
        windows = training if domain is None else {domain: training[domain]}
        return concatenate_datasets(list(windows.values())).shuffle(seed=seed)

    return BaselineModels(base, rows, size, epochs, folder)


def _frozen(base: PreTrainedModel, models: Sequence[MFNForCausalLM]) -> list[None]:
    """What stands for dense models if backbones were not trained: the models themselves, at alpha = 0."""
    import torch

    weights = base.base_model.state_dict()
    for number, model in enumerate(models):
        own = model.model.backbone.state_dict()
        if any(not torch.equal(own[name], weight.to(own[name])) for name, weight in weights.items()):
            raise ValueError(
                f"the backbone of model {number + 1} is not that of {base.name_or_path}: it learnt, too; give --dense, "
                "a model without MFN layers that was trained on as long"
            )
    return [None] * len(models)


__all__ = ["evaluate", "verdict_table"]

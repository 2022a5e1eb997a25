"""The verb `mfn atlas`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..features.atlas import Example, FeatureAtlas
from ..features.atlas.schema import FOLDER, LABELS_FILE
from ..features.atlas.storage import read_labels, write_labels
from ..utils.display import for_terminal

SELDOM, FIRINGS = 0.01, 16
"""Features that are shown fire on at most this share of tokens, and on at least so many tokens."""
BY_PEOPLE = ("human", "imported")
"""Sources of labels that a new harvest does not make again."""


def atlas(
    model: Annotated[str, typer.Argument(help="MFN model: a folder, or an id on the Hub.")],
    output: Annotated[Path | None, typer.Argument(help="Folder that gets features/; the model's by default.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help="Text file, table, folder of them, or data set on the Hub, as --text of train; may be given several "
            "times. Firings are counted by text. Only --labels for an atlas that is there needs none.",
        ),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of tables and data sets that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of data sets on the Hub.")] = "train",
    tokens: Annotated[int | None, typer.Option(help="Tokens to read, in equal shares of the texts.")] = None,
    window: Annotated[int, typer.Option(help="Tokens a row.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Rows at once.")] = 8,
    concepts: Annotated[
        Path | None, typer.Option(help="JSON file of concepts, {name: [word, ...]}, to label features by.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Labels to import: .csv, .json, .jsonl, or an export of Neuronpedia's.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a harvest that was broken off.")] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            help="Replace an atlas that is there, but for its human and imported labels, and, without --resume, a "
            "harvest that was broken off."
        ),
    ] = False,
) -> None:
    """Describe every feature of a model: how often it fires, where, beside which others, and what it promotes.

    With --labels or --concepts, and neither --resume nor --overwrite, an atlas that is there is labelled as it is.

    Example: mfn atlas gpt2-mfn-trained --text corpus.txt --tokens 1000000
    """
    from accelerate import PartialState
    from transformers import AutoTokenizer

    from ..data.text import TextWindows
    from ..features.atlas.label_files import read_label_file
    from ..features.labelling.automatic import label_features
    from ..features.labelling.concepts import read_concepts
    from ..model.modeling_mfn import MFNForCausalLM

    if output is None and not Path(model).is_dir():
        raise ValueError(f"{model} is no folder to write an atlas into; name one: mfn atlas {model} OUTPUT ...")
    folder = output if output is not None else Path(model)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; the output must be a folder")
    there = (folder / FOLDER).exists()
    to_label = concepts is not None or labels is not None
    if there and not overwrite and (resume or not to_label):
        raise ValueError(
            f"{folder} has an atlas; choose another folder, label this one with --labels or --concepts and without "
            "--resume, or --overwrite to replace it, but for its human and imported labels"
        )
    harvesting = overwrite or not there
    reading = harvesting or concepts is not None
    if reading and not text:
        raise ValueError("there is no text to read; give --text")
    for name, number in {"tokens": tokens, "batch-size": batch_size}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")
    # files of concepts and labels are better known to be wrong now than after the harvest
    words = None if concepts is None else read_concepts(concepts)
    if labels is not None:
        read_label_file(labels)
    labels_file = folder / FOLDER / LABELS_FILE
    read_labels(labels_file)
    process = PartialState()
    if reading and text:
        tokenizer = AutoTokenizer.from_pretrained(model)
        windows = TextWindows(text, tokenizer, window, tokens, text_column, split)
        mfn = MFNForCausalLM.from_pretrained(model).to(process.device)
    if harvesting:
        state_folder = folder / f".{FOLDER}-harvest"
        if overwrite and not resume:
            if process.is_main_process:
                shutil.rmtree(state_folder, ignore_errors=True)
            process.wait_for_everyone()
        made = FeatureAtlas.build(
            mfn, tokenizer, windows, batch_size=batch_size, state_folder=state_folder, resume=resume
        )
        for label in read_labels(labels_file):
            if label.source in BY_PEOPLE and label.feature in made:
                made.labels.add(label)
    else:
        made = FeatureAtlas.from_pretrained(folder)
    if not process.is_main_process:
        return
    console = Console()
    data = made.metadata["data"]
    if harvesting:
        made.save_pretrained(folder)
    console.print(f"{folder / FOLDER}: {len(made)} features over {data['tokens']} tokens", markup=False)
    if labels is not None:
        console.print(f"{made.import_labels(labels)} features labelled by {labels}", markup=False)
        write_labels(labels_file, made.labels)
    if words is not None:
        console.print(label_features(made, mfn, tokenizer, windows, words, batch_size=batch_size))
        write_labels(labels_file, made.labels)
    console.print(feature_table(made, interesting_features(made)))


def interesting_features(atlas: FeatureAtlas, count: int = 12) -> list[str]:
    """The names of features that fire seldom, though not just by chance, and then strongly: of those on at most 1 % of
    tokens and at least 16 tokens, those of the largest mean activation in their layer's units, its mean over features.
    """
    frame = atlas.to_pandas()
    scale = frame.groupby("layer")["mean_activation"].transform("mean")
    frame = frame.assign(strength=frame["mean_activation"] / scale)
    seldom = frame[(frame["firing_rate"] <= SELDOM) & (frame["firing_count"] >= FIRINGS)]
    return list((seldom if len(seldom) else frame).nlargest(count, "strength")["name"])


def feature_table(atlas: FeatureAtlas, names: list[str]) -> Table:
    """A table for a terminal: how often each feature fires, what it promotes, and where it is strongest."""
    table = Table("feature", "fires on", "mean", "promotes", "strongest on")
    for name in names:
        record = atlas[name]
        promoted = Text(" ").join(for_terminal(entry["token"], 16) for entry in record.promoted[:4])
        heading = Text(name) if record.label is None else Text.assemble(name, " ", for_terminal(record.label, 24))
        mean = "" if record.mean_activation is None else f"{record.mean_activation:.2f}"
        example = in_context(record.examples[0]) if record.examples else Text("")
        table.add_row(heading, f"{record.firing_rate:.3%}", mean, promoted, example)
    return table


def in_context(example: Example, around: int = 6) -> Text:
    """An example for a terminal: the token in bold with a few tokens around it."""
    first = max(0, example.offset - around)
    pieces = [
        for_terminal(token, 24, style="bold reverse" if at == example.offset else "")
        for at, token in enumerate(example.tokens[first : example.offset + around // 2 + 1], first)
    ]
    return Text.assemble(*pieces)


__all__ = ["atlas", "feature_table", "in_context", "interesting_features"]

"""The verb `mfn atlas`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from .inputs import load_mfn, read_config, read_tokenizer
from .options import console

if TYPE_CHECKING:
    from ..data.text import TextWindows
    from ..features.atlas import FeatureAtlas
    from ..features.atlas.labels import Label
    from ..features.labelling.concepts import Concepts
    from ..model.configuration_mfn import MFNConfig
    from ..model.mfn_for_causal_lm import MFNForCausalLM

SOURCES_KEPT = ("human", "imported")
"""Sources of labels that survive a new harvest. Automatic labels are made anew."""


def atlas(
    model: Annotated[str, typer.Argument(help="MFN model: a folder, or an id on the Hub.")],
    output: Annotated[
        Path | None, typer.Argument(help="Folder in which features/ is written. Default: the model's folder.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help="Text file, table, folder or data set on the Hub, as in mfn train. May be repeated; firings are also "
            "counted per text. Not needed to import --labels into an existing atlas.",
        ),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column with the text, in tables and data sets.")] = "text",
    split: Annotated[str, typer.Option(help="Split of data sets on the Hub.")] = "train",
    tokens: Annotated[int | None, typer.Option(help="Tokens to read, an equal share from each text.")] = None,
    window: Annotated[int, typer.Option(help="Tokens per row.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 8,
    concepts: Annotated[
        Path | None, typer.Option(help="JSON file of concepts, {name: [word, ...]}, from which features get labels.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="File of labels to import: .csv, .json, .jsonl, or Neuronpedia's export.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted harvest.")] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace an existing atlas but keep its human and imported labels. Without --resume, also discard an "
            "interrupted harvest.",
        ),
    ] = False,
) -> None:
    """Describe every feature of a model: how often it fires, on which text, with which others, and what it promotes.

    An existing atlas is only labelled, not replaced, if --labels or --concepts is given without --resume and
    --overwrite.

    Example: mfn atlas gpt2-mfn-trained --text corpus.txt --tokens 1000000
    """
    from ..features.atlas import FeatureAtlas
    from ..features.atlas.storage import check_atlas_folder
    from ..features.atlas.table import atlas_table, interesting_features
    from ..utils.processes import join_processes

    folder = _output_folder(model, output)
    check_atlas_folder(folder)
    harvests = _must_harvest(folder, concepts is not None or labels is not None, resume, overwrite)
    reads = harvests or concepts is not None
    if reads and not text:
        raise ValueError("there is no text to read; give --text")
    _check_positive({"tokens": tokens, "batch-size": batch_size})
    words = _read_label_sources(folder, concepts, labels)
    process = join_processes()
    reader = None
    if reads and text:
        reader = _open_reader(model, text, window, tokens, text_column, split, batch_size)
        reader.model.to(process.device)
    if harvests and reader is not None:
        made = _harvest(reader, folder, resume, overwrite)
    else:
        made = FeatureAtlas.from_pretrained(folder)
    if process.is_main_process:
        if harvests:
            made.save_pretrained(folder)
        seen = f"{len(made)} features over {made.metadata['data']['tokens']} tokens"
        console.print(f"{folder / 'features'}: {seen}", markup=False)
        _label(made, folder, labels, words, reader)
        console.print(atlas_table(made, interesting_features(made)))


class _Reader(NamedTuple):
    """A model and the text that it reads."""

    model: MFNForCausalLM
    tokenizer: Any
    windows: TextWindows
    batch_size: int


def _output_folder(model: str, output: Path | None) -> Path:
    if output is None and not Path(model).is_dir():
        raise ValueError(f"{model} is not a folder to write an atlas into; name one: mfn atlas {model} OUTPUT ...")
    return output if output is not None else Path(model)


def _must_harvest(folder: Path, labels_given: bool, resume: bool, overwrite: bool) -> bool:
    """Returns False for an existing atlas that is only to be labelled; `ValueError` if it would be replaced unasked."""
    from ..features.atlas.schema import FOLDER

    exists = (folder / FOLDER).exists()
    if exists and not overwrite and (resume or not labels_given):
        raise ValueError(
            f"{folder} has an atlas; choose another folder, label this atlas with --labels or --concepts and without "
            "--resume, or replace it with --overwrite, which keeps its human and imported labels"
        )
    return overwrite or not exists


def _check_positive(numbers: dict[str, int | None]) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")


def _read_label_sources(folder: Path, concepts: Path | None, labels: Path | None) -> Concepts | None:
    """Returns the concepts. Reads every file of labels, so that a damaged file is reported before the harvest."""
    from ..features.atlas.label_files import read_label_file
    from ..features.atlas.storage import read_labels
    from ..features.labelling.concepts import read_concepts

    if labels is not None:
        read_label_file(labels)
    read_labels(_labels_file(folder))
    return None if concepts is None else read_concepts(concepts)


def _labels_file(folder: Path) -> Path:
    from ..features.atlas.schema import FOLDER, LABELS_FILE

    return folder / FOLDER / LABELS_FILE


def _open_reader(
    model: str, text: list[str], window: int, tokens: int | None, column: str, split: str, batch_size: int
) -> _Reader:
    from ..data.text import TextWindows

    read_config(model)
    tokenizer = read_tokenizer(model)
    windows = TextWindows(text, tokenizer, window, tokens, column, split)
    return _Reader(load_mfn(model), tokenizer, windows, batch_size)


def _harvest(reader: _Reader, folder: Path, resume: bool, overwrite: bool) -> FeatureAtlas:
    """Builds the atlas. Labels by people are taken over from the atlas that it replaces."""
    from ..features.atlas import FeatureAtlas
    from ..features.atlas.schema import FOLDER
    from ..features.atlas.storage import remove_harvest
    from ..utils.processes import join_processes, wait_for_processes

    kept = _labels_to_keep(folder, reader.model.config)
    process = join_processes()
    state_folder = folder / f".{FOLDER}-harvest"
    if overwrite and not resume:
        if process.is_main_process:
            remove_harvest(state_folder)
        wait_for_processes("the removal of an earlier harvest")
    model, tokenizer, windows, batch_size = reader
    made = FeatureAtlas.build(
        model, tokenizer, windows, batch_size=batch_size, state_folder=state_folder, resume=resume
    )
    for label in kept:
        if label.feature in made:
            made.labels.add(label)
    return made


def _labels_to_keep(folder: Path, config: MFNConfig) -> list[Label]:
    """Labels by people in the atlas that is replaced; `ValueError` if they are of features of other weights."""
    from ..features.atlas.belonging import check_model
    from ..features.atlas.schema import FOLDER
    from ..features.atlas.storage import read_labels, read_metadata

    kept = [label for label in read_labels(_labels_file(folder)) if label.source in SOURCES_KEPT]
    if kept:
        try:
            check_model(read_metadata(folder / FOLDER), config)
            read_labels(_labels_file(folder), config.features_digest)
        except ValueError as error:
            raise ValueError(
                f"{folder} has {len(kept)} labels by people, and not of these features: {error}; to lose the labels, "
                f"delete {_labels_file(folder)}"
            ) from error
    return kept


def _label(
    atlas: FeatureAtlas, folder: Path, labels: Path | None, concepts: Concepts | None, reader: _Reader | None
) -> None:
    """Adds imported and automatic labels to an atlas on disk, and prints how many."""
    from ..features.atlas.storage import features_of, write_labels

    if labels is not None:
        console.print(f"{atlas.import_labels(labels)} features labelled by {labels}", markup=False)
        write_labels(_labels_file(folder), atlas.labels, features_of(atlas.metadata))
    if concepts is not None and reader is not None:
        from ..features.labelling.automatic import label_features

        model, tokenizer, windows, batch_size = reader
        console.print(label_features(atlas, model, tokenizer, windows, concepts, batch_size=batch_size))
        write_labels(_labels_file(folder), atlas.labels, features_of(atlas.metadata))


__all__ = ["atlas"]

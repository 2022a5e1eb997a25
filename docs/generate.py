"""Writes the parts of the reference that the code knows, between their marks.

python -m docs.generate
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import TrainingArguments
from typer.main import get_command

from modeling_mfn import MFNConfig, MFNTrainingArguments
from modeling_mfn.cli.main import app
from modeling_mfn.features.atlas.schema import EXAMPLES, FEATURES, NEURONPEDIA

PAGES = sorted((Path(__file__).parent / "reference").glob("*.md"))
MARKED = re.compile(r"(<!-- generated: (?P<name>\w+) -->\n).*?(<!-- /generated -->)", re.DOTALL)
ARGUMENT = re.compile(r"^    ([\w, ]+) \((.*?)\):\n((?:        .*\n?)+)", re.MULTILINE)


def row(*cells: Any) -> str:
    """A row of a table in Markdown; `|` inside cells is escaped."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"


def config() -> Iterator[str]:
    """The arguments of `MFNConfig`, from its docstring."""
    yield row("field", "default", "meaning") + row("---", "---", "---")
    arguments = (inspect.getdoc(MFNConfig) or "").partition("Args:\n")[2]
    for names, kind, text in ARGUMENT.findall(arguments):
        _, _, default = kind.partition("defaults to ")
        shown = ", ".join(f"`{name}`" for name in names.split(", "))
        yield row(shown, default, " ".join(text.split()))


def training_arguments() -> Iterator[str]:
    """The arguments that `MFNTrainingArguments` has beyond `TrainingArguments`."""
    inherited = {field.name for field in fields(TrainingArguments)}
    yield row("argument", "default", "meaning") + row("---", "---", "---")
    for field in fields(MFNTrainingArguments):
        if field.name not in inherited:
            default = "" if field.default is MISSING else f"`{field.default!r}`"
            yield row(f"`{field.name}`", default, field.metadata["help"])


def cli() -> Iterator[str]:
    """Every verb with its arguments and options."""
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        about = inspect.cleandoc(command.help or "").replace("\f", "")
        words, _, example = about.partition("Example: ")
        yield f"\n## mfn {name}\n\n{words.strip()}\n"
        yield f"\n```bash\n{example.strip()}\n```\n\n" if example else "\n"
        yield row("option", "default", "meaning") + row("---", "---", "---")
        for option in command.params:
            names = " ".join(f"`{each}`" for each in (option.opts or [option.name]))
            if option.param_type_name == "argument":
                names = f"`{option.name.upper()}`"
            elif option.name == "help":
                continue
            default = "" if option.default in (None, ...) or callable(option.default) else f"`{option.default}`"
            if option.required:
                default = "required"
            yield row(names, default, " ".join((getattr(option, "help", None) or "").split()))


def columns(schema: Any) -> Iterator[str]:
    """The columns of a table of an atlas, from its schema."""
    yield row("column", "type", "meaning") + row("---", "---", "---")
    for field in schema:
        yield row(f"`{field.name}`", arrow_type(field.type), field.metadata[b"description"].decode())


def arrow_type(kind: pa.DataType) -> str:
    """A type in words: `list of struct token_id int32, effect float`."""
    if pa.types.is_list(kind):
        return f"list of {arrow_type(kind.value_type)}"
    if pa.types.is_struct(kind):
        return "struct " + ", ".join(f"`{field.name}` {arrow_type(field.type)}" for field in kind)
    return "string" if pa.types.is_dictionary(kind) else str(kind)


def neuronpedia() -> Iterator[str]:
    """Fields of Neuronpedia and their counterparts."""
    yield row("Neuronpedia", "here") + row("---", "---")
    yield from (row(f"`{theirs}`", f"`{ours}`") for theirs, ours in NEURONPEDIA.items())


PARTS: dict[str, Callable[[], Iterator[str]]] = {
    "config": config,
    "training_arguments": training_arguments,
    "cli": cli,
    "features_parquet": partial(columns, FEATURES),
    "examples_parquet": partial(columns, EXAMPLES),
    "neuronpedia": neuronpedia,
}


def rewritten(page: str) -> str:
    """The page with every marked part made anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{''.join(PARTS[found['name']]()).strip()}\n\n{found[3]}", page)


def main() -> None:
    """Rewrites every page of the reference."""
    for file in PAGES:
        file.write_text(rewritten(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

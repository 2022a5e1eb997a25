"""Commands of the benchmarks: each one starts, and documents name modules and options that exist."""

import importlib
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"python -m (benchmarks[\w.]*\w)([^`#\n]*)")
DOCUMENTS = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "model_cards").glob("*.md"), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.py"),
]  # fmt: skip


def app_of(module):
    app = typer.Typer()
    app.command()(importlib.import_module(module).main)
    return app


def modules():
    files = sorted((ROOT / "benchmarks").rglob("*.py"))
    texts = {".".join(file.relative_to(ROOT).with_suffix("").parts): file.read_text(encoding="utf-8") for file in files}
    return [module for module, text in texts.items() if "__main__" in text and not module.endswith("_worker")]


@pytest.mark.parametrize("module", modules())
def test_a_benchmark_starts_and_its_docstring_has_its_command(module):
    result = CliRunner().invoke(app_of(module), ["--help"])
    assert result.exit_code == 0, result.output
    assert f"python -m {module}" in importlib.import_module(module).__doc__


def test_commands_in_documents_have_modules_and_options_that_exist():
    found = 0
    for file in DOCUMENTS:
        for module, rest in COMMAND.findall(file.read_text(encoding="utf-8")):
            command = typer.main.get_command(app_of(module))
            options = {option for parameter in command.params for option in parameter.opts}
            unknown = set(re.findall(r"--[a-z][\w-]*", rest)) - options
            assert not unknown, f"{file.name}: {module}{rest}"
            found += 1
    assert found > 20

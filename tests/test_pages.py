"""Pages of the documents: links, code, paths and pictures are valid, and the reference matches the code."""

import ast
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from prose import blocks, broken_links

from docs import generate

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_links_of_the_documents_lead_somewhere():
    """Links work on GitHub, too. The strict build of the site does not check that."""
    assert [broken for page in PAGES for broken in broken_links(page, page.read_text(encoding="utf-8"))] == []


def test_python_in_the_documents_compiles_and_imports_what_is_there():
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8")):
            for node in ast.walk(ast.parse(block.code)):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("modeling_mfn"):
                    names = ", ".join(name.name for name in node.names)
                    exec(f"from {node.module} import {names}", {})


def test_paths_in_the_documents_exist():
    """Files of the repository that code spans name exist, such as `docs/...`, `examples/...` or `modeling_mfn/...`."""
    pattern = re.compile(r"`((?:docs|examples|benchmarks|tests|modeling_mfn)/[\w./-]+\.\w+)`")
    sources = [*PAGES, *(ROOT / "modeling_mfn").rglob("*.py")]
    named = {(source, path) for source in sources for path in pattern.findall(source.read_text(encoding="utf-8"))}
    assert sorted(f"{source.name}: {path}" for source, path in named if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("page", generate.PAGES, ids=lambda file: file.name)
def test_the_reference_is_what_the_code_says(page):
    text = page.read_text(encoding="utf-8")
    assert generate.rewritten(text) == text, "run python -m docs.generate"


def test_pictures_are_wellformed_and_know_dark_mode():
    pictures = sorted((ROOT / "docs" / "images").glob("*.svg"))
    assert {"block", "sentence"} <= {picture.stem for picture in pictures}
    for picture in pictures:
        text = picture.read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert "prefers-color-scheme: dark" in text, picture.name

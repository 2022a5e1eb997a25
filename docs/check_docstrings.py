"""A hook of the site: whatever the reference shows has a docstring. What lacks one is a warning, so the build fails."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import griffe

SHOWN = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
log = logging.getLogger("mkdocs.hooks.check_docstrings")


def lacking(found: griffe.Object | griffe.Alias) -> Iterator[str]:
    """Paths of a function or class, and of its public members, inherited ones too, that have no docstring.

    A method that overrides a documented one may go without.
    """
    if not found.has_docstring:
        yield found.path
    if found.is_class:
        for name, member in found.all_members.items():
            documented = any(name in base.members and base[name].has_docstring for base in found.mro())
            if not name.startswith("_") and (member.is_function or "property" in member.labels) and not documented:
                yield from lacking(member)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> None:
    """Looks at what the `:::` lines of a page name."""
    for name in SHOWN.findall(markdown):
        package = griffe.load(name.partition(".")[0], search_paths=["."], resolve_aliases=True)
        found = package[name.partition(".")[2]]
        for path in lacking(found.final_target if found.is_alias else found):
            log.warning("%s: %s has no docstring", page.file.src_path, path)

"""Parts of Markdown that tests read: blocks of code with their outputs, sentences, links and anchors."""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FENCED = re.compile(r"^( *)```(?P<language>\w*)\n(?P<body>.*?)^\1```$", re.MULTILINE | re.DOTALL)
NOT_PROSE = re.compile(
    r"^ *```.*?^ *```$|^\|.*?$|^#+ .*?$|<!--.*?-->|^    .*?$|^!\[.*?$|^\[!\[.*?$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"!?\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


class Block(NamedTuple):
    """A block of Python, and the text block that follows as its output, if there is one."""

    code: str
    output: str | None


def blocks(text: str) -> Iterator[Block]:
    found = [(match["language"], match["body"]) for match in FENCED.finditer(text)]
    for (language, body), (following, output) in zip(found, [*found[1:], ("", "")], strict=False):
        if language == "python":
            yield Block(textwrap.dedent(body), output if following == "text" else None)


def sentences(text: str) -> list[str]:
    """Sentences of the prose, without code, tables, headings and pictures. A link is reduced to its text."""
    prose = LINK.sub(lambda link: link["text"], NOT_PROSE.sub("\n\n", text))
    paragraphs = re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) ", prose, flags=re.MULTILINE)
    flat = (re.sub(r"\s+", " ", paragraph).replace("**", "").strip() for paragraph in paragraphs)
    ends = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`*\"(])")
    return [sentence for paragraph in flat for sentence in ends.split(paragraph) if sentence]


def words(sentence: str) -> int:
    return sum(any(character.isalnum() for character in word) for word in sentence.split())


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", LINK.sub(r"\g<text>", heading).lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def broken_links(file: Path, text: str) -> Iterator[str]:
    """Links to files that do not exist, and to headings that a page does not have."""
    for link in LINK.finditer(FENCED.sub("", text)):
        target, _, anchor = link["target"].partition("#")
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        there = (file.parent / target).resolve() if target else file
        known = anchors(there.read_text(encoding="utf-8")) if anchor and there.is_file() else {anchor}
        if not there.exists() or anchor not in known:
            yield f"{file.name}: {link['target']}"

"""A picture of a sentence as its model reads it: the strongest named features of each token, as SVG.

    mfn demo
    python -m benchmarks.smollm2.sentence runs/demo/model "Good my lord, ..." --out docs/images/sentence.svg

A model without an atlas gets one first, from the demo's plays, with automatic labels. A label is a closed class of
words, such as titles of rank, or the set of tokens on which a feature fires.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated
from xml.sax.saxutils import escape

import typer
from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.common.word_lists import closed_classes
from modeling_mfn import FeatureAtlas, MFNForCausalLM, label_features, load_text, pack
from modeling_mfn.demo.assets import shakespeare
from modeling_mfn.features.atlas.schema import FOLDER
from modeling_mfn.features.reading import ActiveFeature, ReadToken, TextReading
from modeling_mfn.utils.display import visible, visible_token

COLUMN, GAP, MARGIN, CHIP, TOP = 118, 8, 16, 52, 60
"""Sizes in pixels: width of a column, gap between columns, margin, height of a feature's box, space above the boxes."""
CHARACTERS = 17
"""Characters of a label in one line of its box."""
TOKEN_SET = re.compile(r"'(.+?)'(?:, |$)", re.DOTALL)
"""A token in a label such as `fires on: ' king', ' queen'`."""
GREY = "#808a94"
HUES = ("#2f7ed8", "#c2571a", "#2e9e6b", "#9457c9", "#b8860b", "#c23b72", "#1f8a9c", "#6b7a1e")
STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de; }
  .token { fill: #1f2328; font: 600 15px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
  .label { fill: #1f2328; font: 500 12px ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
  .small { fill: #656d76; font: 10px ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #161b22; stroke: #30363d; }
    .token, .label { fill: #e6edf3; }
    .small { fill: #8d96a0; }
  }
"""


def chosen(token: ReadToken, count: int) -> list[ActiveFeature]:
    """Strongest labelled features of a token, one per label. Without a labelled feature, the strongest of all."""
    best: dict[str, ActiveFeature] = {}
    for active in token.features:
        if active.label is not None:
            best.setdefault(active.label, active)
    return list(best.values())[:count] or token.features[:1]


def named(active: ActiveFeature, strongest_on: Mapping[str, list[str]]) -> str:
    """Text of a feature's box: its label, or a list of tokens without repetitions.

    Tokens are listed if the label is a set of tokens, or if the feature has no label.
    """
    if active.label is not None and not active.label.startswith("fires on: "):
        return active.label
    tokens = strongest_on.get(active.feature, []) if active.label is None else TOKEN_SET.findall(active.label)
    return " · ".join(dict.fromkeys(map(shown, tokens)))


def shown(token: str) -> str:
    """A token in a label: in lower case, without spaces around it."""
    return visible(token.strip(" ").lower()).replace("\\n", "⏎") or "␣"


def lines(text: str, count: int = 2) -> list[str]:
    """Splits a text into at most `count` lines of `CHARACTERS` characters. Longer lines are cut."""
    words, found = visible(text).split(" "), [""]
    for word in words:
        longer = f"{found[-1]} {word}".strip()
        if len(longer) <= CHARACTERS or not found[-1]:
            found[-1] = longer
        else:
            found.append(word)
    if len(found) > count:
        found = [*found[: count - 1], " ".join(found[count - 1 :])]
    return [line if len(line) <= CHARACTERS else f"{line[: CHARACTERS - 1]}…" for line in found]


def text_at(x: float, y: float, style: str, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>'


def chip_at(x: float, y: float, active: ActiveFeature, name: str, hue: str) -> Iterator[str]:
    """Yields a feature's box. Fill and bar show the activation as a share of the largest one in the atlas."""
    share = min(1.0, active.relative or 0.0)
    dashes = "" if active.label else ' stroke-dasharray="4 3"'
    yield (
        f'<rect x="{x:g}" y="{y:g}" width="{COLUMN}" height="{CHIP}" rx="6" fill="{hue}" '
        f'fill-opacity="{0.08 + 0.3 * share:.2f}" stroke="{hue}" stroke-opacity="0.55"{dashes}/>'
    )
    yield f'<rect x="{x:g}" y="{y + CHIP - 4:g}" width="{COLUMN * share:.1f}" height="4" rx="2" fill="{hue}"/>'
    told = lines(name)
    for number, line in enumerate(told):
        yield text_at(x + COLUMN / 2, y + (15 if len(told) > 1 else 22) + 13.5 * number, "label", line)
    yield text_at(x + COLUMN / 2, y + CHIP - 9, "small", f"{active.feature} · {share:.0%}")


def drawing(reading: TextReading, strongest_on: Mapping[str, list[str]], per_token: int = 2, per_row: int = 7) -> str:
    """Returns the SVG of a reading. Tokens and labels are escaped, and control characters are shown as escapes.

    Args:
        reading: Tokens with their features.
        strongest_on: Feature -> tokens of its strongest examples, for features without a label.
        per_token: Named features shown per token.
        per_row: Tokens per row.
    """
    features = [chosen(token, per_token) for token in reading]
    labels = dict.fromkeys(active.label for of in features for active in of if active.label)
    hues = {None: GREY} | {label: HUES[place % len(HUES)] for place, label in enumerate(labels)}
    rows = [range(start, min(start + per_row, len(reading))) for start in range(0, len(reading), per_row)]
    row_height = TOP + per_token * (CHIP + GAP)
    width = 2 * MARGIN + min(per_row, len(reading)) * (COLUMN + GAP) - GAP
    height = MARGIN + len(rows) * row_height
    body: list[str] = []
    for number, row in enumerate(rows):
        for place, at in enumerate(row):
            x, y = MARGIN + place * (COLUMN + GAP), MARGIN + number * row_height
            token = reading[at]
            body.append(text_at(x + COLUMN / 2, y + 20, "token", visible_token(token.token.strip() or token.token)))
            body.append(text_at(x + COLUMN / 2, y + 37, "small", counted(token)))
            for level, active in enumerate(features[at]):
                level_y = y + TOP - 12 + level * (CHIP + GAP)
                body += chip_at(x, level_y, active, named(active, strongest_on), hues[active.label])
    title = escape("".join(visible(token.token) for token in reading).strip())
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{title}</title><style>{STYLE}</style>'
        f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10"/>'
    )
    return "\n".join([head, *body, "</svg>\n"])


def counted(token: ReadToken) -> str:
    having = sum(active.label is not None for active in token.features)
    return f"{having} of {len(token.features)} have a name"


def prepare(folder: Path, tokens: int, seed: int) -> None:
    """Builds an atlas of the demo's training plays, labels its features and saves it next to the model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = MFNForCausalLM.from_pretrained(folder).eval()
    windows: Dataset = pack(load_text(shakespeare()[0]), tokenizer, 128).shuffle(seed=seed)
    windows = windows.select(range(min(len(windows), tokens // 128)))
    atlas = FeatureAtlas.build(model, tokenizer, windows)
    atlas.save_pretrained(folder)
    Console().print(label_features(atlas, model, tokenizer, windows, closed_classes(), min_words=3.0, seed=seed))
    atlas.save_pretrained(folder)


def main(
    model: Annotated[Path, typer.Argument(help="Folder of an MFN model.")],
    text: Annotated[str, typer.Argument(help="Sentence to read.")],
    out: Annotated[Path, typer.Option(help="SVG file to write.")] = Path("sentence.svg"),
    per_token: Annotated[int, typer.Option(help="Named features shown of each token.")] = 2,
    skip: Annotated[int, typer.Option(help="Tokens at the start that are read and not drawn.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens of the atlas, where the model has none.")] = 64_000,
    seed: Annotated[int, typer.Option(help="Seed of the atlas' text and of the split of words.")] = 0,
) -> None:
    if not (model / FOLDER).exists():
        prepare(model, tokens, seed)
    mfn, tokenizer = MFNForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    every = len(mfn.config.layers) * mfn.config.k
    atlas = FeatureAtlas.from_pretrained(model)
    reading = TextReading(atlas.top(text, mfn, tokenizer, k=every)[skip:])
    unnamed = {active.feature for token in reading for active in chosen(token, 1) if active.label is None}
    out.write_text(drawing(reading, {name: strongest_on(atlas, name) for name in unnamed}, per_token), encoding="utf-8")


def strongest_on(atlas: FeatureAtlas, feature: str, count: int = 5) -> list[str]:
    """Tokens on which a feature has its largest activations."""
    return [example.tokens[example.offset] for example in atlas[feature].examples[:count]]


if __name__ == "__main__":
    typer.run(main)

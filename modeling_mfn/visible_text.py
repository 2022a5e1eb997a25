"""Text from prompts and data sets, made fit to be shown in a terminal or a figure."""

from __future__ import annotations


def visible(text: str, limit: int | None = None) -> str:
    r"""The text with every character that would not show as itself written as an escape: control characters, line
    ends, marks that turn the direction of writing, spaces that are not U+0020, lone surrogates: `\x1b`, `\n`,
    `\u202e`. Longer text than `limit` characters is cut and ends with an ellipsis. Markup of `rich` and mathtext of
    matplotlib are left alone: show it as `rich.text.Text`, and with `parse_math=False`."""
    head = text if limit is None else text[: limit + 1]  # text of any length costs no more than what is shown of it
    shown = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in head)
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


def visible_token(token: str, limit: int = 24) -> str:
    """`visible`, and spaces shown as U+2423: `"␣king"`."""
    return visible(token, limit).replace(" ", "␣")


__all__ = ["visible", "visible_token"]

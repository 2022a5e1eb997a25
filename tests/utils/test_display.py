"""Text of unknown origin made safe for a terminal and for Markdown."""

import pytest
from atlas_data import HOSTILE
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from modeling_mfn.utils.display import for_table_cell, for_terminal, visible, visible_lines


@given(st.text(st.characters(codec=None)))
def test_shown_text_moves_nothing(text):
    """Any text becomes one line without control characters and markup, and HTML without tags and table cells."""
    shown = visible(text, 40)
    assert shown.isprintable()
    assert len(shown) <= 41
    console = Console(width=200)
    with console.capture() as captured:
        console.print(for_terminal(text, 40))
    assert captured.get().rstrip("\n").split("\n") == [shown] or not shown.strip()
    assert not set(for_table_cell(text, 40)) & set("<>|`*_[]\"'\\\n\r\t~!")
    lines = visible_lines(text).split("\n")
    assert all(line.isprintable() for line in lines)
    assert len(lines) == text.count("\n") + 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one\n\n  two\n", "one\n\n  two\n"),
        ("déjà vu 猫 :warning: [red]" * 100, "déjà vu 猫 :warning: [red]" * 100),
        ("\x1b[2J\r\n\t\x9b\u2028\u202e", r"\x1b[2J\r" + "\n" + r"\t\x9b\u2028\u202e"),
        ("z" + "\u0335" * 6, "z" + "\u0335" * 4 + r"\u0335\u0335"),
    ],
)
def test_lines_stay_lines(text, shown):
    assert visible_lines(text) == shown


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_seen_for_what_it_is(text):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(for_terminal(text))
    assert captured.get().isascii() or "…" in captured.get()
    assert captured.get().startswith(visible(text)[:20])
    assert "\x1b" not in captured.get()
    assert len(captured.get()) < 100

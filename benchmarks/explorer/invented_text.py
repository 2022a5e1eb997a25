"""Invented tokens and labels: words of many scripts, and text that tries to break a page."""

from __future__ import annotations

import numpy as np

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "${alert(1)}",
    "javascript:alert(1)",
    "&lt;b&gt;",
    "\"'><svg onload=alert(1)>",
    "]]>--><!--",
    "\u2028line\u2029paragraph",
    "\u202eright to left\u2066",
    "\x00\x07\x1b[31m",
    "\r\n\t",
    "z\u0335\u0321" + "\u0335" * 40,
    "\ufeff\u200b\u200d",
    "long" * 60,
    "#/feature/L0/0?q=&layer=",
    "__proto__",
    "constructor",
]
"""Tokens and labels that a page must show as what they are."""
SCRIPTS = [
    "привет",
    "королева",
    "日本語",
    "中文",
    "한국어",
    "العربية",
    "עברית",
    "हिन्दी",
    "ไทย",
    "ελληνικά",
    "👩‍🚀",
    "🏳️‍🌈",
    "é",
    "ﬁ",
]
SIGNS = [".", ",", " the", " of", " and", " to", " a", " in", "\n", " (", ")", "'s", ' "', ":", ";", "-", "\n\n", "  "]
SYLLABLES = ["ka", "lo", "mi", "ren", "sta", "ve", "tion", "dor", "pel", "qui", "an", "esh", "gro", "ny", "th", "ul"]
TOPICS = ["animals", "royalty", "numbers", "past tense", "French words", "code", "negation", "places", "weather", "law"]


def vocabulary(size: int, generator: np.random.Generator) -> list[str]:
    """Makes different tokens; the first are the most frequent."""
    tokens = dict.fromkeys([*SIGNS, *(f" {word}" for word in SCRIPTS), *SCRIPTS, *HOSTILE])
    while len(tokens) < size:
        word = "".join(generator.choice(SYLLABLES, generator.integers(1, 4)))
        tokens[f" {word}" if generator.random() < 0.7 else word.capitalize()] = None
    return list(tokens)


def label_text(generator: np.random.Generator) -> str:
    """Makes a label; one in thirty is hostile."""
    if generator.random() < 1 / 30:
        return str(generator.choice(np.array([text for text in HOSTILE if text.strip()], object)))
    return f"{generator.choice(TOPICS)} {generator.choice(np.array(SCRIPTS + SYLLABLES, object))}"


__all__ = ["HOSTILE", "label_text", "vocabulary"]

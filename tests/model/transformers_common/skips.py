"""Tests that an MFN model skips and its plain base model passes: (test class, test) -> reason, in one line."""

SKIPS: dict[tuple[str, str], str] = {}

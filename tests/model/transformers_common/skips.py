"""What the plain model passes and the MFN model over it skips: (test class, test) -> the reason, in a line."""

SKIPS: dict[tuple[str, str], str] = {}

"""Text, word lists and small models that benchmarks share."""

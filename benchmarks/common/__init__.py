"""Text, word lists, small models and records that several benchmarks use."""

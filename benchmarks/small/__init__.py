"""Benchmarks on small models: fidelity, the five predictions, remedies, sensitivity."""

"""Benchmarks on SmolLM2-135M, a real checkpoint: fidelity, labels, comparison with sparsify."""

"""SmolLM2-135M, a real checkpoint: fidelity, labels, and comparison with sparsify."""

"""Small models trained on text from packages: fidelity, the five predictions, remedies, sensitivity."""

"""Training of MFN models with the Trainer of transformers."""

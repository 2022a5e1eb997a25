"""Baselines: post-hoc SAEs, fine-tuned SAEs and random SAEs, which learn from the text that MFN models learn from."""

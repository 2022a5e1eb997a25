"""Baselines: post-hoc SAEs, random SAEs and dense models, trained on the same text."""

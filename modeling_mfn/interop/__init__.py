"""Formats of other tools: features of a model written for them."""

"""Sharing on the Hub: the model card, and what of a folder is pushed."""

"""Sharing on the Hub: the model card, and the upload of a model's folder."""

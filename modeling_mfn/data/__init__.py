"""Text on its way to a model: documents, windows of tokens, batches."""

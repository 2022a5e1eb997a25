"""transformers' own common model tests, run on our models. A package, so that its modules import each other by name."""

"""The architecture: everything that a saved model carries to the Hub, and nothing else."""

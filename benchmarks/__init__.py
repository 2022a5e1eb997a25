"""Benchmarks, one module each; a run writes its results to benchmarks/results."""

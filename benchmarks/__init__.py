"""Benchmarks: each is a module that writes its results to benchmarks/results."""

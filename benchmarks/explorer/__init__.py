"""Sizes, times and parts of the explorer."""

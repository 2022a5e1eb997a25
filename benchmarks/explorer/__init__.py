"""Sizes and speed of the explorer."""

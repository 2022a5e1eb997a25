"""Measurements and pictures of the explorer."""

"""Measures of one model or dictionary, from which predictions are made."""

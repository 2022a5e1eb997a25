"""Measures of one model or dictionary that predictions are made of."""

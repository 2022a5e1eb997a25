"""Measuring MFN models."""

"""Formats of other tools: sparse autoencoders (SAEs) in and out, and features written for them."""

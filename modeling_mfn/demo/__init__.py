"""The demo: a real checkpoint converted, trained for a few minutes, read and steered."""

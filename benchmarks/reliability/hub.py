"""The Hub that stands in for the real one, so that its address is known before huggingface_hub is imported."""

from tests.local_hub import LocalHub

HUB = LocalHub()
"""Hub with the repositories of one command at a time."""

"""Text, from files and data sets to windows of tokens."""

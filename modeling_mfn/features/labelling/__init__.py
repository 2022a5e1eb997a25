"""Labels for features, found in an atlas and its text."""

"""Small helpers: text that is safe to show, files that are complete or absent, optional packages, processes."""

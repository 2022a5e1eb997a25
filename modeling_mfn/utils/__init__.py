"""Small helpers without torch: text that is safe to show, files that are complete or absent, processes."""

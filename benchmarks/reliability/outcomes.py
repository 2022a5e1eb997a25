"""Names of what a reader does with damaged input."""

READ, REFUSED = "read", "refused"
FAILURES = ("escaped", "hung", "large")
"""Another error than those that refuse an input, more time, or more memory than a case may take."""

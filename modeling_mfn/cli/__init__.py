"""The command `mfn`, one module a verb."""

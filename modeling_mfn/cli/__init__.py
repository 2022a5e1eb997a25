"""The command `mfn`, one module per verb. No module imports torch or transformers before its verb runs."""

"""The paper's five predictions, one module each."""

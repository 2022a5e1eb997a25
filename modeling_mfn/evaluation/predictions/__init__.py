"""The paper's five predictions (section 7), one module each."""

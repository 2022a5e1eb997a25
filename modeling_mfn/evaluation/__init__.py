"""Evaluation of MFN models: the paper's five predictions with intervals, baselines and reports."""

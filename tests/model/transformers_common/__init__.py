"""Common model tests of transformers, run on MFN models. A package, so that its modules can import each other."""

"""`python -m modeling_mfn.cli` runs the command line."""

from .main import main

main()

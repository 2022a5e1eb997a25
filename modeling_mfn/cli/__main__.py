"""Entry point of `python -m modeling_mfn.cli`."""

from .main import main

main()

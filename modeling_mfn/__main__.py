"""Entry point of `python -m modeling_mfn`."""

from .cli.main import main

main()

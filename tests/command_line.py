"""The command `mfn` in the process of a test."""

from modeling_mfn.cli.main import main


def run(*arguments):
    """Runs a command and returns its exit code, 0 if it just returns."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        return leaving.code or 0
    return 0

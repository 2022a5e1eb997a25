"""One clear line where an optional package is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ImportError):
    """Error for an optional package that is not installed. Its message names the package and the extra that has it."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Names the extra that brings a missing package.

    ```python
    with needs("evaluate"):
        from scipy.stats import spearmanr
    ```

    Args:
        extra: extra of this distribution in which the imported package stands.

    Raises:
        MissingExtra: if a package of others is not installed. Every other error passes unchanged.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package == "modeling_mfn" or package in sys.stdlib_module_names:
            raise
        message = f'{package} is not installed; pip install "modeling-mfn[{extra}]" brings it'
        raise MissingExtra(message, name=error.name) from error


__all__ = ["MissingExtra", "needs"]

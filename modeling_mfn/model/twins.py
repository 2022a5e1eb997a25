"""Classes of this package and their twins.

transformers loads the code that came with a model as modules of its own. Such a model's classes are twins of this
package's: they have the same names and the same code, and `isinstance` does not know them.
"""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

T = TypeVar("T")


def is_a(thing: Any, kind: type[T]) -> TypeGuard[T]:
    """Returns True if `thing` is an instance of a class of this package or of its twin."""
    return any(each.__name__ == kind.__name__ for each in type(thing).__mro__)


def check_has_features(model: Any) -> None:
    """Raises `ValueError` unless a model has MFN layers."""
    if getattr(getattr(model, "config", None), "model_type", None) != "mfn":
        raise ValueError(
            f"{type(model).__name__} has no MFN layers; convert the model first: MFNForCausalLM.from_base(model, ...)"
        )


__all__ = ["check_has_features", "is_a"]

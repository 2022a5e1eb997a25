"""Settings of the base model at the top of an MFN config, where transformers, PEFT and other tools look for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

OF_THE_MODEL = {"architectures", "auto_map", "dtype", "transformers_version"}
"""Settings that every config has and that differ between an MFN model and its base."""
COMMON = {each.name for each in fields(PreTrainedConfig)} - OF_THE_MODEL
"""Settings that every config has and that an MFN model shares with its base."""


class BaseSettings:
    """Part of an MFN config that reads and writes the settings of the base model in the base's own config.

    The config keeps one value of each setting, in `text_config`. So a setting at the top reaches the backbone, and a
    setting of the backbone shows at the top. Files hold it once, too.
    """

    text_config: Any

    def __getattr__(self, name: str) -> Any:
        base = base_of(self)
        if base is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = base_of(self)
        if base is not None and not is_own(self, name) and hasattr(base, name):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    def __iter__(self: Any) -> Iterator[str]:
        yield from self.to_dict()

    def to_dict(self: Any) -> dict[str, Any]:
        """Returns all settings as a dict, those of the base at the top and in `text_config`."""
        own: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {name: value for name, value in own["text_config"].items() if is_of_base(self, name)} | own

    def to_diff_dict(self: Any) -> dict[str, Any]:
        """Returns the settings that files keep. Those of the base are in `text_config` alone."""
        kept: dict[str, Any] = super().to_diff_dict()  # type: ignore[misc]
        return {name: value for name, value in kept.items() if not is_of_base(self, name)}

    def share_with_base(self, given: dict[str, Any]) -> dict[str, Any]:
        """Hands settings of the base that were given next to its config to its config.

        Args:
            given: settings that the class has no fields for.

        Returns:
            Settings that the base's config has none of.
        """
        defaults = PreTrainedConfig()
        # common settings were set before the base's config was there; one that has its default was not given
        early = {name: vars(self).pop(name) for name in COMMON & vars(self).keys()}
        for name, value in early.items():
            if value != getattr(defaults, name):
                setattr(self, name, value)
        for name in [name for name in given if not is_own(self, name) and hasattr(self.text_config, name)]:
            setattr(self.text_config, name, given.pop(name))
        return given


def base_of(config: Any) -> PreTrainedConfig | None:
    """Returns the base's config, or `None` as long as the MFN config has none."""
    base = vars(config).get("text_config")
    return base if isinstance(base, PreTrainedConfig) else None


def is_own(config: Any, name: str) -> bool:
    """Returns True for what an MFN config keeps itself, and for properties, which know their place."""
    return name in OF_THE_MODEL or name.startswith("_") or hasattr(type(config), name)


def is_of_base(config: Any, name: str) -> bool:
    """Returns True for a setting, as dicts name it, that an MFN config keeps in the base's config."""
    return name in COMMON or name == "output_attentions" or not (is_own(config, name) or name in vars(config))


def _shared(name: str) -> property:
    """Property for a setting that every config has as a class attribute, which hides `__getattr__`."""

    def read(config: BaseSettings) -> Any:
        base = base_of(config)
        return vars(config).get(name) if base is None else getattr(base, name)

    def write(config: BaseSettings, value: Any) -> None:
        base = base_of(config)
        if base is None:
            vars(config)[name] = value
        else:
            setattr(base, name, value)

    return property(read, write, doc=f"`{name}` of the base model's config.")


for _name in (*COMMON, "_output_attentions"):
    setattr(BaseSettings, _name, _shared(_name))

__all__ = ["BaseSettings"]

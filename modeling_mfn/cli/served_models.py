"""Server of transformers for one MFN model, under its own name and, steered, under the name of each of its presets."""

from __future__ import annotations

from typing import Any

from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager

from ..model.configuration_mfn import MFNConfig
from .inputs import load_mfn, read_tokenizer

LATEST = "@main"
"""Revision that the server adds to the name of a model."""


def names_of(model: str, config: MFNConfig) -> list[str]:
    """Returns the names under which clients find a model: its own, and one for each preset."""
    return [model, *(f"{model}:{preset}" for preset in config.steering_presets)]


class SteeredModel:
    """A model that generates with a preset.

    Each request generates in one thread from beginning to end, and the context of `steer` belongs to that thread. So
    requests with other presets can run at the same time.
    """

    def __init__(self, model: Any, preset: str) -> None:
        self._model = model
        self._preset = preset

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates as the model does, steered."""
        with self._model.steer(self._preset):
            return self._model.generate(*args, **kwargs)


class ServedModels(model_manager.ModelManager):
    """Models of a server that has one MFN model, and no other."""

    def __init__(self, *args: Any, force_model: str, **options: Any) -> None:
        self.served = force_model
        super().__init__(*args, force_model=force_model, **options)
        self.force_model = None  # the server would refuse the names of presets

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **options: Any) -> tuple[Any, Any]:
        """Returns the model, steered if the name has a preset, and the tokenizer.

        Raises:
            HTTPException: if there is no model of this name.
        """
        found, tokenizer = super().load_model_and_processor(self.served + LATEST, *args, **options)
        name, names = model_id_and_revision.removesuffix(LATEST), names_of(self.served, found.config)
        if name not in names:
            from fastapi import HTTPException

            raise HTTPException(404, f"there is no model {name!r}; this server has {', '.join(names)}")
        preset = name[len(self.served) + 1 :]
        return (SteeredModel(found, preset) if preset else found), tokenizer

    def _load_model(self, *args: Any, **options: Any) -> Any:
        return load_mfn(self.served, dtype=self.dtype, device_map=self.device)

    def _load_processor(self, *args: Any, **options: Any) -> Any:
        return read_tokenizer(self.served)

    def get_gen_models(self, *args: Any) -> list[dict[str, Any]]:
        """Lists the names of the model, as clients ask for them."""
        config = self.loaded_models[self.served + LATEST].model.config
        return [{"id": name, "object": "model", "created": 0, "owned_by": ""} for name in names_of(self.served, config)]


def run_server(model: str, **options: Any) -> None:
    """Runs the server until it is interrupted.

    Args:
        model: folder or id of an MFN model.
        options: of transformers' `Serve`: `host`, `port`, `device`, `dtype`...
    """
    model_manager.ModelManager = ServedModels  # Serve takes it from there, and has no argument for it
    Serve(force_model=model, **options)


__all__ = ["ServedModels", "SteeredModel", "names_of", "run_server"]

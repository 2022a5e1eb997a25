"""Server of transformers for one MFN model, under its own name and, steered, under the name of each of its presets."""

from __future__ import annotations

from typing import Any

from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager, utils

from ..model.configuration_mfn import MFNConfig
from ..model.presets import read_presets, without_pruned
from .inputs import load_mfn, read_config, read_tokenizer

LATEST = "@main"
"""Revision that clients may add to a name."""
RESOLVE = utils.BaseHandler._resolve_model
"""Method of transformers that finds the model of a request."""


def presets_by_name(model: str, config: MFNConfig) -> dict[str, str | None]:
    """Maps the names under which clients find a model to presets: its own to the active one, MODEL:PRESET to PRESET.

    Presets of which pruning left nothing have no name.

    Raises:
        ValueError: if the active preset is such a preset.
    """
    presets: list[str] = []
    for preset, written in read_presets(config.steering_presets, config.layers, config.num_features).items():
        rest, lost = without_pruned(written, config.pruned_features)
        if rest.interventions or not lost:
            presets.append(preset)
    if config.active_preset is not None and config.active_preset not in presets:
        raise ValueError(
            f"active_preset is {config.active_preset!r}, which has nothing left, as features that it needs are pruned; "
            "set config.active_preset to None or to another preset"
        )
    return {model: config.active_preset} | {f"{model}:{preset}": preset for preset in presets}


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
        self.presets = presets_by_name(force_model, read_config(force_model))
        super().__init__(*args, force_model=force_model, **options)
        self.force_model = None  # the server would refuse the names of presets

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Returns a name as it is. With a revision, the presets `calm` and `calm@main` would have one name."""
        return model_id

    def name_of(self, asked: str, gguf_file: str | None) -> str:
        """Returns the name that a client means.

        Args:
            asked: name of a request, without what follows its first colon if `gguf_file` is given.
            gguf_file: what the server took for a file of weights: the end of a name that ends in `.gguf`.

        Raises:
            HTTPException: if there is no model of this name.
        """
        whole = asked if gguf_file is None else f"{asked}:{gguf_file}"
        for name in (whole, whole.removesuffix(LATEST)):
            if name in self.presets:
                return name
        from fastapi import HTTPException

        raise HTTPException(404, f"there is no model {whole!r}; this server has {', '.join(self.presets)}")

    def load_model_and_processor(
        self, model_id_and_revision: str, *args: Any, gguf_file: str | None = None, **options: Any
    ) -> tuple[Any, Any]:
        """Returns the model, steered if its name stands for a preset, and the tokenizer.

        Raises:
            HTTPException: if there is no model of this name.
        """
        preset = self.presets[self.name_of(model_id_and_revision, gguf_file)]
        found, tokenizer = super().load_model_and_processor(self.served, *args, **options)
        return (found if preset is None else SteeredModel(found, preset)), tokenizer

    def load_model_streaming(self, model_id_and_revision: str, gguf_file: str | None = None) -> Any:
        """Loads a model and streams the progress.

        Raises:
            HTTPException: at once, if there is no model of this name.
        """
        return super().load_model_streaming(self.name_of(model_id_and_revision, gguf_file))

    def _load_model(self, *args: Any, **options: Any) -> Any:
        model = load_mfn(self.served, dtype=self.dtype, device_map=self.device)
        model.config.active_preset = None  # other presets would act on its result; the plain name stands for it
        return model

    def _load_processor(self, *args: Any, **options: Any) -> Any:
        return read_tokenizer(self.served)

    def list_models(self, *args: Any) -> list[dict[str, Any]]:
        """Lists the names of the model, as clients ask for them."""
        return [{"id": name, "object": "model", "created": 0, "owned_by": ""} for name in self.presets]

    get_gen_models = list_models  # its name up to transformers 5.23


def resolve_model(handler: Any, body: dict[str, Any]) -> tuple[str, Any, Any]:
    """Returns the name, the model and the tokenizer of a request; of the plain model if the request names none."""
    name = handler.model_manager.served if body.get("model") is None else str(body["model"])
    _, model, tokenizer = RESOLVE(handler, body | {"model": name})
    return name, model, tokenizer


def run_server(model: str, **options: Any) -> None:
    """Runs the server until it is interrupted.

    Args:
        model: folder or id of an MFN model.
        options: of transformers' `Serve`: `host`, `port`, `device`, `dtype`...
    """
    model_manager.ModelManager = ServedModels  # Serve takes it from there, and has no argument for it
    utils.BaseHandler._resolve_model = resolve_model
    Serve(force_model=model, **options)


__all__ = ["ServedModels", "SteeredModel", "presets_by_name", "run_server"]

"""Check that an atlas belongs to a model."""

from __future__ import annotations

from typing import Any


def check_model(metadata: dict[str, Any], model: Any, source: str = "", whole: bool = False) -> None:
    """Checks that an atlas describes the features of a model. Atlases and models of earlier versions do not say.

    Args:
        metadata: Content of `atlas.json`.
        model: The model, or its config.
        source: Name of the model in the error. Default: the one in its config.
        whole: Ask for an atlas of all its layers, too.

    Raises:
        ValueError: If the model has other features: of another training, or trained since.
    """
    config = getattr(model, "config", model)
    source = source or getattr(config, "name_or_path", "") or "the model"
    try:
        made_of = metadata["model"]
        layers, num_features = list(made_of["layers"]), made_of["num_features"]
        theirs, name = made_of.get("features_digest"), made_of.get("name_or_path") or "a model"
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the atlas is damaged: atlas.json does not say of which model it is ({error!r})") from error
    if whole and (layers, num_features) != (list(config.layers), config.num_features):
        raise ValueError(
            f"the atlas is of layers {layers} with {num_features} features, {source} has {config.layers} with "
            f"{config.num_features}; take the atlas of this model"
        )
    # a model knows what a training has changed since; code of earlier versions, and a config, do not
    own = getattr(model, "features_digest", None) or getattr(config, "features_digest", None)
    if theirs and own and theirs != own:
        raise ValueError(
            f"the atlas is of {name} with the features {theirs}, {source} has the features {own}: of another "
            "training, or trained since; make its own atlas (mfn atlas)"
        )


__all__ = ["check_model"]

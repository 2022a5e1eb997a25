"""Finds SAEs on the disk, tells their formats, and downloads SAELens' releases."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedConfig

from ..model.checks import naming, shown
from ..utils.extras import MissingExtra
from . import saelens, sparsify
from .autoencoder import StoredSAE
from .hooks import block_of, layer_of
from .openai import open_openai


def open_sae(place: Path) -> StoredSAE:
    """Reads the settings of an SAE: a folder of SAELens or sparsify, or a `.pt` file of OpenAI.

    Raises:
        ValueError: If it is none of them, is damaged, or does something that no MFN layer does.
    """
    if place.is_file() and place.suffix == ".pt":
        return open_openai(place)
    if (place / saelens.WEIGHTS).is_file():
        return saelens.open_saelens(place)
    if (place / sparsify.WEIGHTS).is_file():
        return sparsify.open_sparsify(place)
    raise ValueError(
        f"{place} holds no SAE; it must be a folder with {saelens.WEIGHTS} (SAELens) or {sparsify.WEIGHTS} (sparsify), "
        "or a .pt file (OpenAI)"
    )


def find_saes(folder: str | Path, text_config: PreTrainedConfig | None = None) -> dict[int, Path]:
    """Finds the SAEs in a folder, at any depth: layer -> place.

    The layer is in the name of each SAE's hook point, which its metadata or the name of its folder or file has.

    Args:
        folder: folder with SAEs in it.
        text_config: config of the base model. With a parallel family, such as GPT-NeoX, it is needed: there a block's
            output is the input of the next block's MFN layer.

    Raises:
        ValueError: If there is none, one names no layer, or two are of one layer.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one with SAEs in it")
    files = [file for name in (saelens.WEIGHTS, sparsify.WEIGHTS) for file in folder.rglob(name)]
    places = [file.parent for file in files] + [file for file in folder.rglob("*.pt") if file.stem.isdecimal()]
    found: dict[int, Path] = {}
    for place in sorted(places):
        layer = int(place.stem) if place.is_file() else _layer_of(open_sae(place), text_config)
        if layer is None:
            raise ValueError(f"nothing in {place} names the block of the SAE; call from_saes with its index")
        if layer in found:
            raise ValueError(f"{found[layer]} and {place} are both of block {layer}; leave one of them in the folder")
        found[layer] = place
    if not found:
        raise ValueError(f"{folder} has no SAE of SAELens, sparsify or OpenAI in it")
    return dict(sorted(found.items()))


def _layer_of(sae: StoredSAE, text_config: PreTrainedConfig | None) -> int | None:
    return layer_of(sae.hook) if text_config is None else block_of(sae.hook, text_config)


@contextmanager
def opened(saes: Mapping[int, str | Path]) -> Iterator[dict[int, StoredSAE]]:
    """Gives the SAEs of layers, each a folder, a `.pt` file or a release of SAELens. Downloads last for the context."""
    with ExitStack() as downloads:
        found = {}
        for layer, place in saes.items():
            path = Path(place)
            if not path.exists():
                release, colon, sae_id = str(place).partition(":")
                if not colon:
                    raise ValueError(
                        f"{shown(str(place))} does not exist; give a folder, a .pt file, or a release of SAELens as "
                        '"release:sae_id"'
                    )
                path = Path(downloads.enter_context(tempfile.TemporaryDirectory(prefix="mfn-sae-")))
                _download(release, sae_id, path)
            with naming(place):
                found[layer] = replace(open_sae(path), source=str(place))
        yield found


def _download(release: str, sae_id: str, folder: Path) -> None:
    """Lets SAELens download an SAE of a release and save it in a folder."""
    try:
        from sae_lens import SAE
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{release}:{sae_id} is no folder here, and SAELens downloads releases; pip install sae-lens brings it",
            name=error.name,
        ) from error
    SAE.from_pretrained(release, sae_id).save_model(folder)


__all__ = ["find_saes", "open_sae", "opened"]

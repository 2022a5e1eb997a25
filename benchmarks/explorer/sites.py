"""The explorer of an invented model with any number of features.

    python -m benchmarks.explorer.sites --features 18432 --out DIR

writes the model's folder DIR/model, without weights, and its explorer DIR/explorer. DIR/explorer/index.html opens from
disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.explorer.invented_atlas import write_model
from modeling_mfn import FeatureAtlas
from modeling_mfn.explorer.site_data.write import write_site


def main(
    out: Annotated[Path, typer.Option(help="New folder for the model and its explorer.")],
    features: Annotated[int, typer.Option(help="Features in all layers together.")] = 18_432,
    seed: Annotated[int, typer.Option(help="Seed of the atlas.")] = 0,
) -> None:
    """Writes an invented model and its explorer."""
    write_model(out / "model", features, seed)
    (out / "explorer").mkdir()
    write_site(FeatureAtlas.from_pretrained(out / "model"), out / "model", out / "explorer", name="invented")


if __name__ == "__main__":
    typer.run(main)

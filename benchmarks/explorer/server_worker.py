"""Process that serves a model for `benchmarks.explorer.server`, and tells its port and its memory before the model."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import psutil
from transformers import AutoTokenizer

from modeling_mfn import FeatureAtlas, MFNForCausalLM
from modeling_mfn.explorer.server.app import create_app, listen, serve
from modeling_mfn.explorer.site_data.write import write_site


def main(folder: Path) -> None:
    """Serves the model in a folder until it is interrupted."""
    told = {"before the model": round(psutil.Process().memory_info().rss / 2**20, 1)}
    model, tokenizer = MFNForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    atlas = FeatureAtlas.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as site:
        write_site(atlas, folder, Path(site), live=True)
        listener = listen("localhost", 0)
        print(json.dumps(told | {"port": listener.getsockname()[1]}), flush=True)
        serve(create_app(model, tokenizer, atlas, Path(site)), listener)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Public explorer of one MFN model, for a Docker Space: everybody may look and steer, nobody can save anything."""

import os
import tempfile
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from modeling_mfn import FeatureAtlas, MFNForCausalLM
from modeling_mfn.explorer.server.access import Access
from modeling_mfn.explorer.server.app import create_app, listen, serve
from modeling_mfn.explorer.server.limits import PUBLIC
from modeling_mfn.explorer.site_data.write import write_site

MODEL = os.environ["MFN_MODEL"]
"""Repository of the model on the Hub, or a folder."""
REVISION = os.environ.get("MFN_REVISION")
PORT = int(os.environ.get("PORT", "7860"))
FRAMED_BY = "https://huggingface.co https://*.hf.space"
"""Sites that show the Space in a frame."""
NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "features/*"]
"""Files of the repository: no code, and no weights that could run any."""


def main() -> None:
    folder = Path(MODEL)
    if not folder.is_dir():
        folder = Path(snapshot_download(MODEL, revision=REVISION, allow_patterns=NEEDED))
    model, tokenizer = MFNForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    atlas = FeatureAtlas.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as site:
        write_site(atlas, folder, Path(site), name=MODEL.rpartition("/")[2], live=True)
        # no token and every name: a Space is public, so that nothing can be saved, and limits are tight
        access = Access(hosts=None, framed_by=FRAMED_BY)
        app = create_app(model, tokenizer, atlas, Path(site), limits=PUBLIC, access=access)
        listener = listen("0.0.0.0", PORT)
        print(f"the explorer of {MODEL} is at port {PORT}", flush=True)
        serve(app, listener)


if __name__ == "__main__":
    main()

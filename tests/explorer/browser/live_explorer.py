"""The explorer's server in a thread, around a tiny model with hostile tokens and labels."""

import functools
import json
import tempfile
import threading
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import uvicorn
from conftest import make_base, make_mfn
from datasets import Dataset
from tokenizers_for_tests import numbered_words

from modeling_mfn import FeatureAtlas
from modeling_mfn.explorer.server.app import create_app, listen
from modeling_mfn.explorer.server.limits import Limits
from modeling_mfn.explorer.site_data.write import write_site

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "\u202eright to left\u2066",
    "\x1b[31m\x00\n",
    "z\u0335\u0321" + "\u0335" * 50,
    "${alert(3)} {{alert(4)}} javascript:alert(5)",
]
"""Texts of the tokens from 20 on, and labels of features."""
LABELS = ["names of rulers", 'it\'s "5 $USD" `x`=clamp:2@L0/1', *HOSTILE]
LIMITS = Limits(text_tokens=100, explained_tokens=60, new_tokens=400, running=1)


class Live:
    """A running server and what it serves."""

    def __init__(self, model, tokenizer, folder, app, port):
        self.model, self.tokenizer, self.folder, self.app = model, tokenizer, folder, app
        self.atlas = FeatureAtlas.from_pretrained(folder)
        self.address = f"http://127.0.0.1:{port}/"

    def url(self, page, **state):
        return f"{self.address}#/{page}?{urlencode(state, doseq=True)}"

    @property
    def running(self):
        return self.app.state.jobs.running


def make_model(folder):
    """Makes a model with two MFN layers and writes it with tokenizer, atlas and labels."""
    model = make_mfn(make_base("llama-tied", max_position_embeddings=512), layers=[0, 2], k=6, codes="update")
    model.generation_config.eos_token_id = None
    tokenizer = numbered_words(HOSTILE)
    ids = np.random.default_rng(0).integers(1, 96, (60, 16))
    atlas = FeatureAtlas.build(model, tokenizer, Dataset.from_dict({"input_ids": ids.tolist()}), progress=False)
    for part in (model, tokenizer, atlas):
        part.save_pretrained(folder)
    labels = [
        {"feature": f"L{layer}/{index}", "label": LABELS[index % 8], "source": "automatic", "score": 0.9}
        for layer in (0, 2)
        for index in range(0, 80, 3)
    ]
    (folder / "features" / "labels.json").write_text(json.dumps(labels))
    return model, tokenizer


@functools.cache
def live():
    """Starts the server once; it ends with the process."""
    folder, site = (Path(tempfile.mkdtemp()) for _ in range(2))
    model, tokenizer = make_model(folder)
    write_site(FeatureAtlas.from_pretrained(folder), folder, site, name="tiny", live=True)
    app = create_app(model, tokenizer, FeatureAtlas.from_pretrained(folder), site, folder=folder, limits=LIMITS)
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    return Live(model, tokenizer, folder, app, listener.getsockname()[1])

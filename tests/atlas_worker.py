"""Process of a harvest, started by `test_harvest_merging.py`: python atlas_worker.py SETTINGS.json"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from atlas_data import windows, word_tokenizer
from conftest import make_base, make_mfn

from modeling_mfn import FeatureAtlas
from modeling_mfn.features.atlas import ExampleLimits
from modeling_mfn.features.harvest import harvest as harvesting
from modeling_mfn.utils.processes import join_processes


class Windows:
    """Rows, one after the other; the process is killed at row `die_at`."""

    def __init__(self, rows, die_at):
        self.rows, self.die_at = rows, die_at

    def __iter__(self):
        for number, row in enumerate(self.rows):
            if number == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield row


def main(settings):
    torch.set_num_threads(1)
    model = make_mfn(make_base("llama-tied"), layers=[0, 2])
    data = windows(30)
    if settings["streamed"]:
        data = Windows(data, settings.get("die_at"))
    counted, count_batch = [], harvesting.count_batch
    harvesting.count_batch = lambda state, *given: counted.append(state.batches - 1) or count_batch(state, *given)
    atlas = FeatureAtlas.build(
        model, word_tokenizer(), data, batch_size=4, examples=ExampleLimits(3, 2, 4, 2), progress=False,
        state_folder=settings["state"], resume=settings["resume"], save_every=8,
    )  # fmt: skip
    process = join_processes()
    (Path(settings["output"]).parent / f"batches-{process.process_index}.json").write_text(json.dumps(counted))
    if process.is_main_process:
        atlas.save_pretrained(settings["output"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

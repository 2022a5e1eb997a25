"""Scores of all probes on all tasks, as a table: of one model, layer by layer, or of the tokens alone.

A row has `layer`, `task` (its place among the tasks), `source`, `probe`, and the `training`, `held_out` and `shuffled`
of `probes.Score`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from ...utils.extras import needs
from .probes import best_feature_information, linear_probe, scaled, sparse_probes
from .tasks import Task, rows_of, task_places, token_arrays

with needs("evaluate"):
    import pandas as pd
    from scipy.sparse import csr_array, hstack

    from ...features.activations import activations_at

if TYPE_CHECKING:
    from ...data.windows import Windows
    from ...model.mfn_for_causal_lm import MFNForCausalLM

CODE, RESIDUAL = "code", "residual"
"""Sources that probes read."""
LINEAR, INFORMATION = "linear probe", "information"
SPARSE = {1: "purity", 2: "two-feature probe", 5: "five-feature probe"}
"""Number of columns -> name of the sparse probe."""
PURITY = SPARSE[1]


def probe_model(
    model: MFNForCausalLM,
    windows: Windows,
    tasks: Sequence[Task],
    *,
    residuals: bool = True,
    batch_size: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """Fits and judges all probes on a model's codes and, with `residuals`, on the residual streams h before its layers.

    With `codes="update"`, the code of a layer's stream is the codes of all layers up to it, column beside column.

    Args:
        model: MFN model, which runs as it is.
        windows: text that the tasks are made of.
        tasks: see [`tasks.word_tasks`] and [`tasks.formatting_tasks`].
        residuals: True to probe h, too.
        batch_size: windows per forward.
        seed: seed of the folds for regularisation.
    """
    places = task_places(tasks)
    at = activations_at(model, windows, places, residuals=residuals, batch_size=batch_size)
    rows = []
    with tqdm(total=len(at.codes) * len(tasks), desc="probing", unit="task", leave=False) as bar:
        for layer, code in _codes_of_streams(model, at.codes):
            for number, task in enumerate(tasks):
                chosen = rows_of(task, places)
                sources: dict[str, Any] = {CODE: code[chosen]}
                if residuals:
                    sources[RESIDUAL] = at.residuals[layer][chosen].astype(np.float64)
                for source, features in sources.items():
                    for probe, score in _scores(features, task, source, seed):
                        rows.append({"layer": layer, "task": number, "source": source, "probe": probe, **score})
                bar.update()
    return pd.DataFrame(rows)


def _codes_of_streams(model: MFNForCausalLM, codes: Mapping[int, csr_array]) -> Iterator[tuple[int, csr_array]]:
    """Yields each layer with the code (P, columns) of the stream that it leaves."""
    for place, (layer, code) in enumerate(codes.items()):
        written = list(codes.values())[: place + 1]
        yield layer, hstack(written, format="csr") if model.config.codes == "update" else code


def probe_tokens(windows: Windows, tasks: Sequence[Task], *, seed: int = 0) -> pd.DataFrame:
    """Fits and judges all probes on one-hot token ids, with `layer` -1: what the token alone tells."""
    ids = token_arrays(windows)[0].ravel()
    rows = []
    for number, task in enumerate(tasks):
        distinct, column = np.unique(ids[task.places], return_inverse=True)
        starts = np.arange(len(column) + 1, dtype=np.int32)
        one_hot = csr_array((np.ones(len(column)), column.astype(np.int32), starts), (len(column), len(distinct)))
        for probe, score in _scores(one_hot, task, CODE, seed):
            rows.append({"layer": -1, "task": number, "source": CODE, "probe": probe, **score})
    return pd.DataFrame(rows)


def _scores(features: Any, task: Task, source: str, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    in_units = scaled(features, ~task.held_out)
    for size, score in sparse_probes(in_units, task, tuple(SPARSE)).items():
        yield SPARSE[size], score._asdict()
    yield LINEAR, linear_probe(in_units, task, seed)._asdict()
    if source == CODE:
        yield INFORMATION, best_feature_information(features, task)._asdict()


__all__ = ["CODE", "INFORMATION", "LINEAR", "PURITY", "RESIDUAL", "SPARSE", "probe_model", "probe_tokens"]

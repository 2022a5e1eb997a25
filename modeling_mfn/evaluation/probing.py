"""P2: whether concepts are easier to read off the code z than off the residual stream h, and off an MFN model's code
than off a post-hoc SAE's.

The area under the ROC curve of one sparse feature is about recall, too: a feature that fires on a share r of a
concept's tokens, and on no other token, has (1 + r) / 2. A concept that is spread over features of single words scores
low, though each of these is clean; probes of two and five features show how far that goes. A coordinate of h is never
0, and pays no such price.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..modeling_mfn import MFNForCausalLM
from .activations import Windows, activations_at
from .information import best_feature_information
from .probes import linear_probe, scaled, sparse_probes
from .result import MFN, POST_HOC_SAE, RESIDUAL_STREAM, Figure, Outcome, PredictionResult, Subjects, bootstrap, mean
from .tasks import Task, rows_of, task_places

CODE, RESIDUAL = "code", "residual"
LINEAR, INFORMATION = "linear probe", "information"
SPARSE = {1: "purity", 2: "two-feature probe", 5: "five-feature probe"}
PURITY = SPARSE[1]
BASE_RESIDUAL_STREAM = f"{RESIDUAL_STREAM} of the base model"
LEAST_GAIN = 0.1
CLAIM = (
    "Linear probes on z outperform probes on h for concept tests; probe purity is at least 10 % above a post-hoc SAE's."
)
CRITERION = (
    "Purity is the area under the ROC curve (AUROC) of the best single feature, chosen on training words and judged on "
    "held-out ones, averaged over tasks; for h it is the best coordinate. Confirmed if (a) the purity of the MFN "
    "model's codes is at least 10 % above that of the post-hoc SAE's codes and above that of the coordinates of the "
    "MFN model's residual stream, with the whole intervals of 95 % of both gains, and (b) the linear probe on all of z "
    "has a larger AUROC than that on all of h of the same model, with the whole interval of the difference; partly if "
    "one of (a) and (b) holds. As an AUROC is at most 1, it cannot gain 10 % on a baseline above 0.909; and 0.5 is "
    "chance, so that a relative gain in AUROC looks smaller than it is. The gain in what is above chance, AUROC - 0.5, "
    "is fairer and stands beside it."
)


def probe_purity(
    subjects: Subjects, windows: Windows, tasks: Sequence[Task], *, batch_size: int = 8, seed: int = 0
) -> PredictionResult:
    """Probes each subject's codes, and the residual streams that the MFN model and the post-hoc SAE read, on all tasks
    in all layers. Models run as they are. Intervals are by bootstrap over tasks, resampled together for all subjects.

    Figures of each subject and residual stream are AUROCs on held-out units unless something else is said: "purity",
    the one-feature probe; "two-feature probe", "five-feature probe", "linear probe"; the first and the last also on
    training units, with shuffled labels, which is 0.5 but for chance, and for each group of tasks; and of subjects
    "information", that of `information.best_feature_information`. Those of the MFN model have the gains, too.

    Args:
        subjects: name -> models. Without the MFN model or the post-hoc SAE the outcome is "not measured".
        windows: text that no model was trained on, the one that the tasks are of.
        tasks: see [`tasks.word_tasks`] and [`tasks.formatting_tasks`]. Without any the outcome is "not measured".
        batch_size: windows a batch.
        seed: of the folds for regularisation, and of the bootstrap.
    """
    if not tasks:
        return _result("not measured", "the text has too few tokens of any concept or format", {}, {})
    tables = []
    for name, models in subjects.items():
        for number, model in enumerate(models):
            with_residual = name in (MFN, POST_HOC_SAE)
            table = probe_model(model, windows, tasks, residuals=with_residual, batch_size=batch_size, seed=seed)
            residual = RESIDUAL_STREAM if name == MFN else BASE_RESIDUAL_STREAM
            table["subject"] = table["source"].map({CODE: name, RESIDUAL: residual})
            tables.append(table.assign(seed=number))
    table = pd.concat(tables, ignore_index=True)
    groups = np.array([task.group for task in tasks])
    figures = {str(name): _figures(of, groups, seed) for name, of in table.groupby("subject", sort=False)}
    outcome, reason = _not_measured(subjects)
    if not reason:
        figures[MFN] |= _gains(table, seed)
        outcome, reason = _judge(figures)
    return _result(outcome, reason, figures, _details(table, tasks))


def _result(outcome: Outcome, reason: str, figures: dict[str, dict[str, Figure]], details: Any) -> PredictionResult:
    return PredictionResult("P2", CLAIM, CRITERION, outcome, reason, PURITY, figures, POST_HOC_SAE, details)


def probe_model(
    model: MFNForCausalLM,
    windows: Windows,
    tasks: Sequence[Task],
    *,
    residuals: bool = True,
    batch_size: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """All scores of one model: a row for each layer, task, `source` ("code", and "residual" if asked for) and `probe`,
    with `training`, `held_out` and `shuffled` of `probes.Score`. `task` is the place in `tasks`."""
    places = task_places(tasks)
    at = activations_at(model, windows, places, residuals=residuals, batch_size=batch_size)
    rows = []
    with tqdm(total=len(at.codes) * len(tasks), desc="probing", unit="task", leave=False) as bar:
        for layer, code in at.codes.items():
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


def _scores(features: Any, task: Task, source: str, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    in_units = scaled(features, task)
    for size, score in sparse_probes(in_units, task, tuple(SPARSE)).items():
        yield SPARSE[size], score._asdict()
    yield LINEAR, linear_probe(in_units, task, seed)._asdict()
    if source == CODE:
        yield INFORMATION, best_feature_information(features, task)._asdict()


def _by_task(table: pd.DataFrame, probe: str, column: str = "held_out") -> np.ndarray:
    """(tasks,) averaged over layers and seeds."""
    values: np.ndarray = table[table["probe"] == probe].groupby("task")[column].mean().to_numpy()
    return values


def _figures(table: pd.DataFrame, groups: np.ndarray, seed: int) -> dict[str, Figure]:
    """Those of one subject."""
    figures = {}
    probes = table["probe"].unique().tolist()
    for probe in probes:
        figures[probe] = mean(_by_task(table, probe), seed)
    for probe in (PURITY, LINEAR):
        for group in dict.fromkeys(groups.tolist()):
            figures[f"{probe}, {group}"] = mean(_by_task(table, probe)[groups == group], seed)
    for probe in {PURITY, LINEAR, INFORMATION}.intersection(probes):
        figures[f"{probe}, training"] = mean(_by_task(table, probe, "training"), seed)
        figures[f"{probe}, shuffled labels"] = mean(_by_task(table, probe, "shuffled"), seed)
    return figures


def relative_gain(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The mean over tasks against that of a baseline: 0.1 is 10 % more."""
    return float(ours.mean() / theirs.mean() - 1)


def gain_above_chance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The same of what AUROCs are above 0.5."""
    return relative_gain(ours - 0.5, theirs - 0.5)


def _gains(table: pd.DataFrame, seed: int) -> dict[str, Figure]:
    """The MFN model's figures against baselines, task by task."""
    of = {str(name): own for name, own in table.groupby("subject")}
    ours, figures = _by_task(of[MFN], PURITY), {}
    for baseline in (POST_HOC_SAE, RESIDUAL_STREAM, BASE_RESIDUAL_STREAM):
        theirs = _by_task(of[baseline], PURITY)
        figures[f"purity gain over {baseline}"] = bootstrap(relative_gain, ours, theirs, seed=seed)
        figures[f"purity gain above chance over {baseline}"] = bootstrap(gain_above_chance, ours, theirs, seed=seed)
        linear = _by_task(of[MFN], LINEAR) - _by_task(of[baseline], LINEAR)
        figures[f"linear probe less {baseline}"] = mean(linear, seed)
    return figures


def _not_measured(subjects: Subjects) -> tuple[Outcome, str]:
    """A reason if a subject is missing."""
    missing = [name for name in (MFN, POST_HOC_SAE) if not subjects.get(name)]
    return "not measured", f"no {' and no '.join(missing)} among the subjects" if missing else ""


def _judge(figures: dict[str, dict[str, Figure]]) -> tuple[Outcome, str]:
    """The outcome by `CRITERION`, and why."""
    ours = figures[MFN]
    gains = [ours[f"purity gain over {baseline}"] for baseline in (POST_HOC_SAE, RESIDUAL_STREAM)]
    linear = ours[f"linear probe less {RESIDUAL_STREAM}"]
    purer, better = all(gain.low >= LEAST_GAIN for gain in gains), linear.low > 0
    outcome: Outcome = "confirmed" if purer and better else "partly" if purer or better else "not confirmed"
    reason = (
        f"purity {ours[PURITY]} is {_percent(gains[0])} against the post-hoc SAE's {figures[POST_HOC_SAE][PURITY]} and "
        f"{_percent(gains[1])} against the coordinates of h; the linear probe on z is {linear.value:+.3f} "
        f"[{linear.low:+.3f}, {linear.high:+.3f}] against that on h"
    )
    return outcome, reason


def _percent(gain: Figure) -> str:
    return f"{gain.value:+.1%} [{gain.low:+.1%}, {gain.high:+.1%}]"


def _details(table: pd.DataFrame, tasks: Sequence[Task]) -> dict[str, Any]:
    """Purity and linear probe by layer, seed and task, and what the tasks have."""
    kept = table[table["probe"].isin([PURITY, LINEAR])]
    details: dict[str, Any] = {}
    for column in ("layer", "seed"):
        averages = kept.groupby(["subject", "probe", column])["held_out"].mean()
        details[f"by_{column}"] = _nested(averages)
    by_task = kept.groupby(["task", "subject", "probe"])["held_out"].mean()
    details["tasks"] = [
        {
            "name": task.name,
            "group": task.group,
            "tokens": len(task.places),
            "units": len(np.unique(task.units)),
            "held_out_units": len(np.unique(task.units[task.held_out])),
            "held_out": _nested(by_task[number]),
        }
        for number, task in enumerate(tasks)
    ]
    return details


def _nested(series: pd.Series) -> dict[str, Any]:
    """A series with an index of several levels as dictionaries within each other."""
    found: dict[str, Any] = {}
    for keys, value in series.items():
        place = found
        for key in keys[:-1]:
            place = place.setdefault(str(key), {})
        place[str(keys[-1])] = float(value)
    return found


__all__ = ["BASE_RESIDUAL_STREAM", "CRITERION", "gain_above_chance", "probe_model", "probe_purity", "relative_gain"]

"""P2: whether concepts are easier to read off the code z than off the residual stream h, and off an MFN model's code
than off a post-hoc SAE's.

The area under the ROC curve of one sparse feature is about recall, too: a feature that fires on a share r of a
concept's tokens, and on no other token, has (1 + r) / 2. A concept that is spread over features of single words scores
low, though each of these is clean; probes of two and five features show how far that goes. A coordinate of h is never
0, and pays no such price.

Some concepts can be told by the token at hand: a word of several tokens is probed at its last one, which may be "ly".
What a probe that knows nothing but tokens makes of each task stands beside, as the subject "token identity", and linear
probes once more on the tasks alone where that is near chance.

Tasks of one group overlap: each part of speech is held against the others. So each group counts as much as another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_array
from tqdm.auto import tqdm

from ...data.windows import Windows
from ...features.activations import activations_at
from ...model.modeling_mfn import MFNForCausalLM
from ..intervals import Estimate, mean
from ..measures.probes import best_feature_information, linear_probe, scaled, sparse_probes
from ..measures.tasks import FORMATTING, Task, rows_of, task_places, token_arrays
from ..result import MFN, POST_HOC_SAE, RESIDUAL_STREAM, Outcome, PaperCriterion, PredictionResult, Subjects

CODE, RESIDUAL = "code", "residual"
LINEAR, INFORMATION = "linear probe", "information"
SPARSE = {1: "purity", 2: "two-feature probe", 5: "five-feature probe"}
PURITY = SPARSE[1]
BASE_RESIDUAL_STREAM = f"{RESIDUAL_STREAM} of the base model"
TOKEN_IDENTITY = "token identity"
LEAST_GAIN = 0.1
NEAR_CHANCE = 0.55
"""What a linear probe on tokens has less than where the token alone does not tell."""
GAIN_OVER_H, GAIN_OVER_SAE = "purity gain over h", f"purity gain over {POST_HOC_SAE}"
BEYOND_TOKENS = f"{LINEAR}, where the token tells nothing"
CLAIM = (
    "Linear probes on z outperform probes on h for concept tests; probe purity is at least 10 % above a post-hoc SAE's."
)
PAPER_CRITERION = (
    "Probe purity at least 10 % above that of a post-hoc SAE. (The paper's text claims more: that linear probes on z "
    "outperform those on h. The stricter criterion asks for both.)"
)
CRITERION = (
    "Purity is the area under the ROC curve (AUROC) on held-out words of one feature, the one whose area is farthest "
    "from 0.5 on training words, averaged over the groups of tasks of words (over those of formats, if there are no "
    "others); for h it is that of one coordinate. Confirmed if the purity of the MFN model's codes is (a) at least 10 "
    "% above that of the coordinates of the MFN model's own h, and (b) at least 10 % above that of the post-hoc SAE's "
    "codes, with the whole intervals of 95 % of both gains; (c) the linear probe on all of z has a larger AUROC than "
    "that on all of the MFN model's own h, and a larger one than that on all of the base model's h where that was "
    "measured, with the whole intervals of the differences; and each of these gains is above 0 in every seed. Partly "
    "if (a) or (c) holds. Not measured if no group has two tasks, as there is no interval then. As an AUROC is at most "
    "1, it cannot gain 10 % on a baseline above 0.909; and 0.5 is chance, so that a relative gain in AUROC looks "
    "smaller than it is. The gain in what is above chance, AUROC - 0.5, is fairer and stands beside it."
)


def probe_purity(
    subjects: Subjects,
    windows: Windows,
    tasks: Sequence[Task],
    *,
    untested: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> PredictionResult:
    """Probes each subject's codes, the residual streams that the MFN model and the base read, and the tokens
    themselves, on all tasks in all layers. Models run as they are. The base's residual stream is what a post-hoc SAE at
    alpha = 0 reads, the same in every seed, so that the first one's serves. Intervals are over tasks, Student's t with
    the spread within groups; those of gains to first order (the delta method), paired by task. How much seeds differ is
    not in them: `details` has the figures by seed.

    Figures of each subject, residual stream and of "token identity" are AUROCs on held-out units, averaged over the
    groups of `judged` tasks, unless something else is said: "purity", the one-feature probe; "two-feature probe",
    "five-feature probe", "linear probe"; the first and the last also on training units, with shuffled labels, which is
    0.5 but for chance, and for each group of tasks, those of formats, too; "linear probe, where the token tells
    nothing", on the tasks where that of "token identity" is below 0.55; and "information", that of
    `information.best_feature_information`. "purity gain over h" is that of a code over the residual stream that its
    encoder reads. Those of the MFN model have the other gains, too.

    Args:
        subjects: name -> models. Without the MFN model or the post-hoc SAE the outcome is "not measured".
        windows: text that no model was trained on, the one that the tasks are of.
        tasks: see [`tasks.word_tasks`] and [`tasks.formatting_tasks`]. With none, or no two of a group to judge on,
            the outcome is "not measured".
        untested: group -> concepts that there is no task of, for the details; see [`tasks.without_task`].
        batch_size: windows a batch.
        seed: of the folds for regularisation.
    """
    details: dict[str, Any] = {"untested": {group: list(names) for group, names in (untested or {}).items()}}
    if not tasks:
        return _result("not measured", "the text has too few tokens of any concept or format for a task", {}, details)
    table = _table(subjects, windows, tasks, batch_size, seed)
    beyond = judged(tasks) & (_by_task(table[table["subject"] == TOKEN_IDENTITY], LINEAR) < NEAR_CHANCE)
    figures = {str(name): _figures(of, tasks, beyond) for name, of in table.groupby("subject", sort=False)}
    for name, stream in ((MFN, RESIDUAL_STREAM), (POST_HOC_SAE, BASE_RESIDUAL_STREAM)):
        if name in figures and stream in figures:
            ours, theirs = (_by_task(table[table["subject"] == of], PURITY) for of in (name, stream))
            figures[name][GAIN_OVER_H] = relative_gain(ours, theirs, _groups(tasks))
    details |= _details(table, tasks)
    missing = [name for name in (MFN, POST_HOC_SAE) if not subjects.get(name)]
    if missing:
        return _result("not measured", f"no {' and no '.join(missing)} among the subjects", figures, details)
    figures[MFN] |= _gains(table, tasks, beyond)
    details["gains_by_seed"] = gains_by_seed(table, tasks)
    if math.isnan(figures[MFN][PURITY].low):
        return _result("not measured", "no group has two tasks to judge on, so there is no interval", figures, details)
    outcome, reason = _judge(figures, details["gains_by_seed"])
    reason += f"; {_beyond_tokens(figures, beyond, tasks)}"
    if all(task.group == FORMATTING for task in tasks):
        reason += "; on formats, as there is no task of words"
    return _result(outcome, reason, figures, details)


def _result(outcome: Outcome, reason: str, figures: dict[str, dict[str, Estimate]], details: Any) -> PredictionResult:
    paper = PaperCriterion.judged(
        PAPER_CRITERION, figures, GAIN_OVER_SAE, lambda gain: gain >= LEAST_GAIN, POST_HOC_SAE
    )
    return PredictionResult("P2", CLAIM, CRITERION, outcome, reason, GAIN_OVER_H, figures, POST_HOC_SAE, paper, details)


def judged(tasks: Sequence[Task]) -> np.ndarray:
    """(tasks,) bool, the ones that P2 is judged on: those of words, or all if there are none of words."""
    of_words = np.array([task.group != FORMATTING for task in tasks], bool)
    return of_words if of_words.any() else ~of_words


def _table(subjects: Subjects, windows: Windows, tasks: Sequence[Task], batch_size: int, seed: int) -> pd.DataFrame:
    """All scores of all subjects: those of `probe_model`, with `subject` and the number of the `seed`."""
    tables = []
    for name, models in subjects.items():
        residual = RESIDUAL_STREAM if name == MFN else BASE_RESIDUAL_STREAM
        for number, model in enumerate(models):
            reads_base = name == POST_HOC_SAE and number == 0 and model.config.alpha == 0
            residuals = name == MFN or reads_base
            table = probe_model(model, windows, tasks, residuals=residuals, batch_size=batch_size, seed=seed)
            subject = table["source"].map({CODE: name, RESIDUAL: residual})
            tables.append(table.assign(subject=subject, seed=number))
    tables.append(probe_tokens(windows, tasks, seed=seed).assign(subject=TOKEN_IDENTITY, seed=0))
    return pd.concat(tables, ignore_index=True)


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


def probe_tokens(windows: Windows, tasks: Sequence[Task], *, seed: int = 0) -> pd.DataFrame:
    """What is known from the token alone: the scores of probes on the one-hot token ids of a text, as `probe_model` has
    them of a code, with `layer` -1."""
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


def _by_task(table: pd.DataFrame, probe: str, column: str = "held_out") -> np.ndarray:
    """(tasks,) averaged over layers and seeds, in the order of tasks."""
    values: np.ndarray = table[table["probe"] == probe].groupby("task")[column].mean().to_numpy()
    return values


def _groups(tasks: Sequence[Task]) -> np.ndarray:
    """(tasks,) of the judged ones their group, of the others ""."""
    return np.where(judged(tasks), [task.group for task in tasks], "")


def _average(values: np.ndarray, groups: np.ndarray) -> Estimate:
    """Of values (tasks,), over those that have a group."""
    return mean(values[groups != ""], groups[groups != ""])


def _figures(table: pd.DataFrame, tasks: Sequence[Task], beyond: np.ndarray) -> dict[str, Estimate]:
    """Those of one subject."""
    figures, chosen = {}, _groups(tasks)
    groups = np.array([task.group for task in tasks])
    probes = table["probe"].unique().tolist()
    for probe in probes:
        figures[probe] = _average(_by_task(table, probe), chosen)
    figures[BEYOND_TOKENS] = _average(_by_task(table, LINEAR), np.where(beyond, chosen, ""))
    for probe in (PURITY, LINEAR):
        for group in dict.fromkeys(groups.tolist()):
            figures[f"{probe}, {group}"] = mean(_by_task(table, probe)[groups == group])
    for probe in (probe for probe in (PURITY, LINEAR, INFORMATION) if probe in probes):
        figures[f"{probe}, training"] = _average(_by_task(table, probe, "training"), chosen)
        figures[f"{probe}, shuffled labels"] = _average(_by_task(table, probe, "shuffled"), chosen)
    return figures


def relative_gain(ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray) -> Estimate:
    """The mean over groups of tasks (tasks,) against that of a baseline, 0.1 is 10 % more. Its interval is to first
    order that of the mean of ours - (1 + gain) theirs, divided by the baseline's mean."""
    baseline = _average(theirs, groups).value
    gain = _average(ours, groups).value / baseline - 1
    around = _average((ours - (1 + gain) * theirs) / baseline, groups)
    return Estimate(gain, gain + around.low - around.value, gain + around.high - around.value)


def gain_above_chance(ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray) -> Estimate:
    """The same of what AUROCs are above 0.5."""
    return relative_gain(ours - 0.5, theirs - 0.5, groups)


def _baselines(table: pd.DataFrame) -> list[str]:
    measured = set(table["subject"])
    return [name for name in (POST_HOC_SAE, RESIDUAL_STREAM, BASE_RESIDUAL_STREAM) if name in measured]


def _gains(table: pd.DataFrame, tasks: Sequence[Task], beyond: np.ndarray) -> dict[str, Estimate]:
    """The MFN model's figures against baselines, task by task."""
    of = {str(name): own for name, own in table.groupby("subject")}
    ours, figures, groups = _by_task(of[MFN], PURITY), {}, _groups(tasks)
    for baseline in _baselines(table):
        theirs = _by_task(of[baseline], PURITY)
        if baseline != RESIDUAL_STREAM:
            figures[f"purity gain over {baseline}"] = relative_gain(ours, theirs, groups)
        figures[f"purity gain above chance over {baseline}"] = gain_above_chance(ours, theirs, groups)
        linear = _by_task(of[MFN], LINEAR) - _by_task(of[baseline], LINEAR)
        figures[f"linear probe less {baseline}"] = _average(linear, groups)
        figures[f"{BEYOND_TOKENS}, less {baseline}"] = _average(linear, np.where(beyond, groups, ""))
    return figures


def gains_by_seed(table: pd.DataFrame, tasks: Sequence[Task]) -> dict[str, list[float]]:
    """Name of a gain -> what it is in each seed of the MFN model, against the same seed of the baseline, or against the
    mean of the baseline's where it lacks that seed."""
    averages, gains = _over_groups(table, tasks, "seed"), {}
    for baseline in _baselines(table):
        for probe in (PURITY, LINEAR):
            ours, theirs = averages[MFN, probe], averages[baseline, probe]
            theirs = theirs.reindex(ours.index).fillna(theirs.mean())
            if probe == PURITY:
                name = GAIN_OVER_H if baseline == RESIDUAL_STREAM else f"purity gain over {baseline}"
                gains[name] = (ours / theirs - 1).tolist()
            else:
                gains[f"linear probe less {baseline}"] = (ours - theirs).tolist()
    return gains


def _over_groups(table: pd.DataFrame, tasks: Sequence[Task], column: str) -> pd.Series:
    """By subject, probe and a further column, averaged over the groups of judged tasks."""
    kept = table.assign(group=_groups(tasks)[table["task"]]).query("group != ''")
    by_group = kept.groupby(["subject", "probe", column, "group"])["held_out"].mean()
    return by_group.groupby(["subject", "probe", column]).mean()


def _judge(figures: dict[str, dict[str, Estimate]], by_seed: Mapping[str, Sequence[float]]) -> tuple[Outcome, str]:
    """The outcome by `CRITERION`, and why."""
    ours = figures[MFN]
    linear = {
        of: f"linear probe less {baseline}"
        for of, baseline in (("its own h", RESIDUAL_STREAM), ("the base's h", BASE_RESIDUAL_STREAM))
        if baseline in figures
    }
    purer = ours[GAIN_OVER_H].low >= LEAST_GAIN
    better = all(ours[of].low > 0 for of in linear.values())
    in_every_seed = all(gain > 0 for name in (GAIN_OVER_H, GAIN_OVER_SAE, *linear.values()) for gain in by_seed[name])
    every = purer and better and ours[GAIN_OVER_SAE].low >= LEAST_GAIN
    outcome: Outcome = "confirmed" if every and in_every_seed else "partly" if purer or better else "not confirmed"
    against = " and ".join(f"{_difference(ours[name])} against that on {of}" for of, name in linear.items())
    reason = (
        f"purity {ours[PURITY]} is {_percent(ours[GAIN_OVER_H])} against the {figures[RESIDUAL_STREAM][PURITY]} of the "
        f"coordinates of its own h and {_percent(ours[GAIN_OVER_SAE])} against the post-hoc SAE's "
        f"{figures[POST_HOC_SAE][PURITY]}; the linear probe on z is {against}"
    )
    if every and not in_every_seed:
        reason += "; but not all of these gains are above 0 in every seed"
    return outcome, reason


def _beyond_tokens(figures: dict[str, dict[str, Estimate]], beyond: np.ndarray, tasks: Sequence[Task]) -> str:
    """What linear probes tell that the token alone does not."""
    number = (
        f"{beyond.sum()} of {judged(tasks).sum()} tasks where the token alone tells nothing (AUROC below {NEAR_CHANCE})"
    )
    if not beyond.any():
        return number
    gain = figures[MFN][f"{BEYOND_TOKENS}, less {RESIDUAL_STREAM}"]
    return f"on the {number} it is {figures[MFN][BEYOND_TOKENS]}, {_difference(gain)} against that on its own h"


def _difference(gain: Estimate) -> str:
    return f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def _percent(gain: Estimate) -> str:
    return f"{gain.value:+.1%} [{gain.low:+.1%}, {gain.high:+.1%}]"


def _details(table: pd.DataFrame, tasks: Sequence[Task]) -> dict[str, Any]:
    """Purity and linear probe by layer and seed, over judged tasks, and by task; and what the tasks have."""
    kept = table[table["probe"].isin([PURITY, LINEAR])]
    of_models = kept[kept["subject"] != TOKEN_IDENTITY]
    details: dict[str, Any] = {
        f"by_{column}": _nested(_over_groups(of_models, tasks, column)) for column in ("layer", "seed")
    }
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


__all__ = [
    "BASE_RESIDUAL_STREAM", "CRITERION", "TOKEN_IDENTITY", "gain_above_chance", "gains_by_seed", "judged",
    "probe_model", "probe_purity", "probe_tokens", "relative_gain",
]  # fmt: skip

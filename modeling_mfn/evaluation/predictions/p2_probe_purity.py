"""P2, probe purity: "Linear probes on z outperform probes on h for concept tests", by at least 10 % in purity.

Measured: the area under the ROC curve (AUROC) of probes of one, two, five and all columns, on held-out words. Columns
are features of a code z or coordinates of a residual stream h. Purity is the AUROC of the best single column.

- The AUROC of a single feature is limited by its recall: a feature that fires on a share r of a concept's tokens, and
  on no other token, has (1 + r) / 2. A coordinate of h is never 0 and has no such limit. Probes of two and five
  features show how much that matters.
- Some concepts can be told by the token at hand: a word of several tokens is probed at its last one, which may be "ly".
  Probes of the token alone are the subject "token identity". Linear probes are also reported on the tasks where these
  are close to chance.
- With `codes="update"`, h is the whole stream. Its code is the codes of all layers up to it. Embeddings are not in it,
  though they are named parts of the stream.
- Tasks of one group overlap: each part of speech is compared with the others. Each group therefore counts as much as
  another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...utils.extras import needs
from ..intervals import Estimate, mean
from ..measures.probe_scores import CODE, INFORMATION, LINEAR, PURITY, RESIDUAL, probe_model, probe_tokens
from ..measures.tasks import FORMATTING, Task, judged
from ..result import MFN, POST_HOC_SAE, RESIDUAL_STREAM, Outcome, PaperCriterion, PredictionResult, Subjects

with needs("evaluate"):
    import pandas as pd

if TYPE_CHECKING:
    from ...data.windows import Windows

CLAIM = (
    "Linear probes on z outperform probes on h for concept tests; probe purity is at least 10 % above a post-hoc SAE's."
)
MIN_GAIN = 0.1
PAPER_CRITERION = (
    "Probe purity at least 10 % above that of a post-hoc SAE. (The paper's text claims more: that linear probes on z "
    "outperform those on h. The stricter criterion asks for both.)"
)
CRITERION = (
    "Purity is the AUROC on held-out words of one feature, the one whose AUROC is farthest from 0.5 on training words. "
    "It is averaged over groups of tasks of words, or of formats if there are no others. "
    "Confirmed if all of these hold with their whole 95 % intervals, and each gain is above 0 in every seed. "
    "(a) The purity of the MFN model's codes is at least 10 % above that of the coordinates of its own h. "
    "(b) It is at least 10 % above that of the post-hoc SAE's codes. "
    "(c) The linear probe on all of z has a larger AUROC than that on all of its own h, and than that on all of the "
    "base model's h where this was measured. "
    "Partly confirmed if (a) or (c) holds. Not measured if no group has two tasks, since there is no interval then. "
    "An AUROC is at most 1 and cannot gain 10 % on a baseline above 0.909. As 0.5 is chance, the relative gain in "
    "AUROC - 0.5 is fairer and is reported, too."
)
TOKEN_IDENTITY = "token identity"
BASE_RESIDUAL_STREAM = f"{RESIDUAL_STREAM} of the base model"
NEAR_CHANCE = 0.55
"""AUROC of a linear probe on tokens below which the token alone tells nothing."""

GAIN_OVER_H, GAIN_OVER_SAE = "purity gain over h", f"purity gain over {POST_HOC_SAE}"
BEYOND_TOKENS = f"{LINEAR}, where the token tells nothing"


def probe_purity(
    subjects: Subjects,
    windows: Windows,
    tasks: Sequence[Task],
    *,
    untested: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> PredictionResult:
    """Measures P2: probes codes, residual streams and tokens on all tasks in all layers.

    Residual streams are those of the MFN models and of the base model. A post-hoc SAE at alpha = 0 reads the base
    model's, which is the same for every seed and measured once. Models run as they are.

    Each subject, residual stream and "token identity" has these measures, AUROCs on held-out units averaged over the
    groups of judged tasks:

    - "purity", "two-feature probe", "five-feature probe", "linear probe": probes of one, two, five and all columns;
    - "linear probe, where the token tells nothing": on tasks where that of "token identity" is below 0.55;
    - "information": see [`probes.best_feature_information`];
    - "purity, training", "purity, shuffled labels" and the like: on training units, and with shuffled labels, which
      shows chance;
    - "purity, GROUP" and "linear probe, GROUP": on the tasks of each group, formats among them;
    - "purity gain over h": of a code over the residual stream that its encoder reads. MFN has further gains.

    Intervals are Student's t over tasks with the spread within groups. Intervals of gains are paired by task and to
    first order (delta method). Differences between seeds are not in them: `details` has measures by seed.

    Args:
        subjects: name -> models. Without MFN models or post-hoc SAEs the outcome is "not measured".
        windows: text that no model was trained on and that tasks are made of.
        tasks: see [`tasks.word_tasks`] and [`tasks.formatting_tasks`]. Without two tasks of one group the outcome is
            "not measured".
        untested: group -> concepts that have no task, for the details; see [`tasks.without_task`].
        batch_size: windows per forward.
        seed: seed of the folds for regularisation.
    """
    details: dict[str, Any] = {"untested": {group: list(names) for group, names in (untested or {}).items()}}
    if not tasks:
        return _result("not measured", "the text has too few tokens of any concept or format for a task", {}, details)
    scores = _Scores(_table(subjects, windows, tasks, batch_size, seed), tasks)
    estimates = {name: _estimates(scores, name) for name in scores.subjects}
    details |= _details(scores)
    missing = [name for name in (MFN, POST_HOC_SAE) if not subjects.get(name)]
    if missing:
        return _result("not measured", f"no {' and no '.join(missing)} among the subjects", estimates, details)
    estimates[MFN] |= _gains(scores)
    details["gains_by_seed"] = _gains_by_seed(scores)
    if math.isnan(estimates[MFN][PURITY].low):
        return _result(
            "not measured", "no group has two tasks to judge on, so there is no interval", estimates, details
        )
    outcome, reason = _judge(estimates, details["gains_by_seed"])
    reason += f"; {_beyond_tokens(estimates, scores)}"
    if all(task.group == FORMATTING for task in tasks):
        reason += "; on formats, as there is no task of words"
    return _result(outcome, reason, estimates, details)


def _result(outcome: Outcome, reason: str, estimates: dict[str, dict[str, Estimate]], details: Any) -> PredictionResult:
    paper = PaperCriterion.judged(
        PAPER_CRITERION, estimates, GAIN_OVER_SAE, lambda gain: gain >= MIN_GAIN, POST_HOC_SAE
    )
    return PredictionResult(
        "P2", CLAIM, CRITERION, outcome, reason, GAIN_OVER_H, estimates, POST_HOC_SAE, paper, details
    )


class _Scores:
    """Scores of all subjects: the tables of `probe_scores` with the `subject` and the number of its `seed`."""

    def __init__(self, table: pd.DataFrame, tasks: Sequence[Task]) -> None:
        self.table, self.tasks = table, tasks
        self.subjects: list[str] = table["subject"].unique().tolist()
        self.groups = np.where(judged(tasks), [task.group for task in tasks], "")
        """(tasks,) group of each judged task, "" for others."""
        untold = self.areas(TOKEN_IDENTITY, LINEAR) < NEAR_CHANCE
        self.untold_groups = np.where(untold, self.groups, "")
        """(tasks,) group of each judged task on which the token alone tells nothing, "" for others."""

    def areas(self, subject: str, probe: str, side: str = "held_out") -> np.ndarray:
        """(tasks,) mean over layers and seeds of one column of the table."""
        rows = self.table[(self.table["subject"] == subject) & (self.table["probe"] == probe)]
        values: np.ndarray = rows.groupby("task")[side].mean().to_numpy()
        return values

    def over_groups(self, column: str) -> pd.Series:
        """Means over groups of judged tasks, by subject, probe and one more column."""
        kept = self.table.assign(group=self.groups[self.table["task"]]).query("group != ''")
        by_group = kept.groupby(["subject", "probe", column, "group"])["held_out"].mean()
        return by_group.groupby(["subject", "probe", column]).mean()

    @property
    def baselines(self) -> list[str]:
        """Subjects that the MFN model is compared with."""
        return [name for name in (POST_HOC_SAE, RESIDUAL_STREAM, BASE_RESIDUAL_STREAM) if name in self.subjects]


def _table(subjects: Subjects, windows: Windows, tasks: Sequence[Task], batch_size: int, seed: int) -> pd.DataFrame:
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


def _mean(values: np.ndarray, groups: np.ndarray) -> Estimate:
    """Mean of values (tasks,) over groups. Tasks of the group "" are left out."""
    return mean(values[groups != ""], groups[groups != ""])


def _relative_gain(ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray) -> Estimate:
    """Relative gain of the mean over groups of tasks (tasks,), where 0.1 is 10 % more.

    To first order its interval is that of the mean of ours - (1 + gain) theirs, divided by the baseline's mean.
    """
    baseline = _mean(theirs, groups).value
    gain = _mean(ours, groups).value / baseline - 1
    around = _mean((ours - (1 + gain) * theirs) / baseline, groups)
    return Estimate(gain, gain + around.low - around.value, gain + around.high - around.value)


def _estimates(scores: _Scores, subject: str) -> dict[str, Estimate]:
    """Measures of one subject."""
    probes = scores.table[scores.table["subject"] == subject]["probe"].unique().tolist()
    estimates = {probe: _mean(scores.areas(subject, probe), scores.groups) for probe in probes}
    estimates[BEYOND_TOKENS] = _mean(scores.areas(subject, LINEAR), scores.untold_groups)
    groups = np.array([task.group for task in scores.tasks])
    for probe in (PURITY, LINEAR):
        for group in dict.fromkeys(groups.tolist()):
            estimates[f"{probe}, {group}"] = mean(scores.areas(subject, probe)[groups == group])
    for probe in (probe for probe in (PURITY, LINEAR, INFORMATION) if probe in probes):
        estimates[f"{probe}, training"] = _mean(scores.areas(subject, probe, "training"), scores.groups)
        estimates[f"{probe}, shuffled labels"] = _mean(scores.areas(subject, probe, "shuffled"), scores.groups)
    reads = {MFN: RESIDUAL_STREAM, POST_HOC_SAE: BASE_RESIDUAL_STREAM}.get(subject, "")
    if reads in scores.subjects:
        ours, theirs = scores.areas(subject, PURITY), scores.areas(reads, PURITY)
        estimates[GAIN_OVER_H] = _relative_gain(ours, theirs, scores.groups)
    return estimates


def _gains(scores: _Scores) -> dict[str, Estimate]:
    """Gains of the MFN model over each baseline, paired by task."""
    ours, estimates, groups = scores.areas(MFN, PURITY), {}, scores.groups
    for baseline in scores.baselines:
        theirs = scores.areas(baseline, PURITY)
        if baseline != RESIDUAL_STREAM:
            estimates[f"purity gain over {baseline}"] = _relative_gain(ours, theirs, groups)
        estimates[f"purity gain above chance over {baseline}"] = _relative_gain(ours - 0.5, theirs - 0.5, groups)
        linear = scores.areas(MFN, LINEAR) - scores.areas(baseline, LINEAR)
        estimates[f"linear probe less {baseline}"] = _mean(linear, groups)
        estimates[f"{BEYOND_TOKENS}, less {baseline}"] = _mean(linear, scores.untold_groups)
    return estimates


def _gains_by_seed(scores: _Scores) -> dict[str, list[float]]:
    """Gains of each seed over the same seed of a baseline, or over the baseline's mean where it lacks the seed."""
    averages, gains = scores.over_groups("seed"), {}

    def pair(baseline: str, probe: str) -> tuple[pd.Series, pd.Series]:
        ours, theirs = averages[MFN, probe], averages[baseline, probe]
        return ours, theirs.reindex(ours.index).fillna(theirs.mean())

    for baseline in scores.baselines:
        ours, theirs = pair(baseline, PURITY)
        name = GAIN_OVER_H if baseline == RESIDUAL_STREAM else f"purity gain over {baseline}"
        gains[name] = (ours / theirs - 1).tolist()
        ours, theirs = pair(baseline, LINEAR)
        gains[f"linear probe less {baseline}"] = (ours - theirs).tolist()
    return gains


def _judge(estimates: dict[str, dict[str, Estimate]], by_seed: Mapping[str, Sequence[float]]) -> tuple[Outcome, str]:
    """Applies `CRITERION`. Returns the outcome and the reason."""
    ours = estimates[MFN]
    linear = {
        of: f"linear probe less {baseline}"
        for of, baseline in (("its own h", RESIDUAL_STREAM), ("the base's h", BASE_RESIDUAL_STREAM))
        if baseline in estimates
    }
    purer = ours[GAIN_OVER_H].low >= MIN_GAIN
    better = all(ours[name].low > 0 for name in linear.values())
    in_every_seed = all(gain > 0 for name in (GAIN_OVER_H, GAIN_OVER_SAE, *linear.values()) for gain in by_seed[name])
    every = purer and better and ours[GAIN_OVER_SAE].low >= MIN_GAIN
    outcome: Outcome = "confirmed" if every and in_every_seed else "partly" if purer or better else "not confirmed"
    against = " and ".join(f"{_signed(ours[name])} against that on {of}" for of, name in linear.items())
    reason = (
        f"purity {ours[PURITY]} is {_percent(ours[GAIN_OVER_H])} against the {estimates[RESIDUAL_STREAM][PURITY]} of "
        f"the coordinates of its own h and {_percent(ours[GAIN_OVER_SAE])} against the post-hoc SAE's "
        f"{estimates[POST_HOC_SAE][PURITY]}; the linear probe on z is {against}"
    )
    if every and not in_every_seed:
        reason += "; but not all of these gains are above 0 in every seed"
    return outcome, reason


def _beyond_tokens(estimates: dict[str, dict[str, Estimate]], scores: _Scores) -> str:
    """Sentence about linear probes on tasks where the token alone tells nothing."""
    untold, tasks = (scores.untold_groups != "").sum(), (scores.groups != "").sum()
    text = f"{untold} of {tasks} tasks where the token alone tells nothing (AUROC below {NEAR_CHANCE})"
    if not untold:
        return text
    gain = estimates[MFN][f"{BEYOND_TOKENS}, less {RESIDUAL_STREAM}"]
    return f"on the {text} it is {estimates[MFN][BEYOND_TOKENS]}, {_signed(gain)} against that on its own h"


def _signed(gain: Estimate) -> str:
    return f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def _percent(gain: Estimate) -> str:
    return f"{gain.value:+.1%} [{gain.low:+.1%}, {gain.high:+.1%}]"


def _details(scores: _Scores) -> dict[str, Any]:
    """Purity and linear probe by layer and by seed over judged tasks, and by task, with the size of each task."""
    table = scores.table[scores.table["probe"].isin([PURITY, LINEAR])]
    details: dict[str, Any] = {}
    for column in ("layer", "seed"):
        averages = scores.over_groups(column).drop(TOKEN_IDENTITY, level="subject")
        details[f"by_{column}"] = _nested(averages[averages.index.isin([PURITY, LINEAR], level="probe")])
    by_task = table.groupby(["task", "subject", "probe"])["held_out"].mean()
    details["tasks"] = [
        {
            "name": task.name,
            "group": task.group,
            "tokens": len(task.places),
            "units": len(np.unique(task.units)),
            "held_out_units": len(np.unique(task.units[task.held_out])),
            "held_out": _nested(by_task[number]),
        }
        for number, task in enumerate(scores.tasks)
    ]
    return details


def _nested(series: pd.Series) -> dict[str, Any]:
    """Series with an index of several levels as nested dictionaries."""
    found: dict[str, Any] = {}
    for keys, value in series.items():
        place = found
        for key in keys[:-1]:
            place = place.setdefault(str(key), {})
        place[str(keys[-1])] = float(value)
    return found


__all__ = ["BASE_RESIDUAL_STREAM", "CRITERION", "TOKEN_IDENTITY", "probe_purity"]

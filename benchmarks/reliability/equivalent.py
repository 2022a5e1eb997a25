"""Mutants that change nothing a user could see, each with the reason."""

from __future__ import annotations

import re
from typing import NamedTuple


class Change(NamedTuple):
    """A change of a module's source. It holds no line number, so it stays valid when lines move."""

    place: str
    """Module, and the class or function in it."""
    before: str
    """Changed lines, or in a claim a part of them."""
    after: str

    def covers(self, other: Change) -> bool:
        """Returns True if this change turns the lines before another one into those after it."""
        made = other.before.replace(self.before, self.after, 1)
        return self.place == other.place and made != other.before and _dense(made) == _dense(other.after)


def _dense(text: str) -> str:
    """Text without spaces, which Cosmic Ray sets in its own way."""
    return re.sub(r"\s", "", text)


MATRIX = "The tensor has two dimensions, and the last one is number 1."
VECTOR = "The tensor has one dimension, which is number 0 and the last one."
EQUIVALENT: dict[Change, str] = {
    Change(place, before, after): reason
    for reason, changes in {
        MATRIX: [
            ("losses.rate_loss", "shape[-1]", "shape[1]"),
            ("losses._slope", "values.sum(-1", "values.sum(1"),
            ("losses._slope", "(values > 0).sum(-1", "(values > 0).sum(1"),
            ("losses._slope", "amin(-1", "amin(1"),
            ("losses.competition_loss", "sort(-1)", "sort(1)"),
            ("losses.competition_loss", "gather(-1", "gather(1"),
            ("losses.stability_loss", "partners).square().sum(-1)", "partners).square().sum(1)"),
            ("losses.stability_loss", "alone.square().sum(-1)", "alone.square().sum(1)"),
            ("losses.distillation_loss", "float(), -1)", "float(), 1)"),
            ("mfn_layer.MFNLayer.initialise", "normalize(rows, dim=-1)", "normalize(rows, dim=1)"),
            ("mfn_layer.MFNLayer.reset_features", "norm(dim=-1)", "norm(dim=1)"),
        ],
        VECTOR: [
            ("losses.competition_loss", "index_add(0,", "index_add(-1,"),
            ("losses._per_feature", "index_add(0,", "index_add(-1,"),
            ("mfn_layer.MFNLayer.directions", "unsqueeze(-1)", "unsqueeze(1)"),
            ("feature_rows.FeatureRows._tables", "cumsum(0)", "cumsum(-1)"),
            ("sparse_code._ChosenPreActivations.backward", "index_add(0,", "index_add(-1,"),
        ],
        "Both ways find the same values, and the choice changes time alone.": [
            ("sparse_code", "GROUP_SIZE = 8", "GROUP_SIZE = 9"),
            ("sparse_code", "GROUP_SIZE = 8", "GROUP_SIZE = 7"),
            ("sparse_code.largest", "groups < 3", "groups <= 3"),
            ("sparse_code.largest", "3 * count", "4 * count"),
            ("sparse_code.largest", "3 * count", "2 * count"),
            ("sparse_code.largest", '!= "cpu"', '== "cpu"'),
        ],
        "torch reads where bags start only if it is not told the bag of each pair.": [
            ("sparse_code._dot_rows", "arange(0,", "arange(1,"),
            ("sparse_code._dot_rows", "arange(0,", "arange(-1,"),
        ],
        "Each forward brings the places of the prompt to the device of its input.": [
            ("steering.generating", "None if prompt is None", "None if prompt is not None"),
            ("steering.generating", "None if prompt is None", "None if not prompt is None"),
        ],
        "Tables need no gradient.": [
            ("feature_rows.FeatureRows", "@torch.no_grad()", ""),
        ],
        "At alpha 0 the output is the stream either way, and its graph costs time alone.": [
            ("mfn_layer.MFNLayer._reconstruct_for_losses", "self.alpha == 0", "self.alpha == -1"),
        ],
        "The limit is far above both numbers, so that the factor is 1.": [
            ("mfn_layer._shortened", "clamp_min(1)", "clamp_min(2)"),
            ("mfn_layer._shortened", "clamp_min(1)", "clamp_min(0)"),
        ],
        "Mean and standard deviation are both there, or neither is.": [
            ("mfn_layer.Standardised.undo", "None or self", "None and self"),
        ],
        "The lengths are equal.": [
            ("mfn_layer.MFNLayer.normalise_directions", "strict=True", "strict=False"),
        ],
        "torch calls the method by its class, where a plain function does the same.": [
            ("sparse_code._ChosenPreActivations", "@staticmethod", ""),
            ("sparse_code._WeightedRows", "@staticmethod", ""),
            ("sparse_code._SumsByFeature", "@staticmethod", ""),
            ("sparse_code._ThroughInput", "@staticmethod", ""),
        ],
        "Only the type and the device of the tensor are read.": [
            ("steering.steering", "empty(0,", "empty(1,"),
        ],
        "Places before the text read some column of the mask, and are then left out.": [
            ("steering._tokens", "clamp(0,", "clamp(-1,"),
        ],
        "Where there is no intervention, an infinite activation is compared.": [
            ("steering._step", "else 0.0 for each in row] for", "else 1.0 for each in row] for"),
            ("steering._step", "else 0.0 for each in row] for", "else -1.0 for each in row] for"),
        ],
        "One row is repeated, in place of being spread by torch.": [
            ("steering._by_row", "shape[0] == 1", "shape[0] == 0"),
        ],
        "Both types give the same pairs, and the narrow one only sorts faster.": [
            ("losses.competition_loss", "<=", "<"),
            ("losses.competition_loss", "num_features**2 <=", "num_features**3 <="),
        ],
        "A schedule of one step has the share 0 wherever it divides.": [
            ("schedules.Schedule.at", "max(self.steps, 1)", "max(self.steps, 2)"),
        ],
    }.items()
    for place, before, after in changes
}
"""Change -> reason."""

"""Interventions as data: they are written as they are made, and do not change."""

from dataclasses import FrozenInstanceError

import pytest

from modeling_mfn import Ablate, Add, Clamp, Scale

WRITTEN = {
    "Clamp(4.0)": (Clamp(4), (0.0, 4.0)),
    "Add(-1.5, when='L0/3', above=0.25)": (Add(-1.5, when=(0, 3), above=0.25), (1.0, -1.5)),
    "Scale(0.5, when='L2/9', above=0.0)": (Scale(0.5, when="L2/9"), (0.5, 0.0)),
    "Ablate()": (Ablate(), (0.0, 0.0)),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_an_intervention_is_written_as_it_is_made(text):
    intervention, coefficients = WRITTEN[text]
    assert repr(intervention) == text
    assert eval(text) == intervention
    assert intervention.coefficients == coefficients
    with pytest.raises(FrozenInstanceError):
        intervention.above = 1.0

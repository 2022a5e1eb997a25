"""Schedules of alpha and k, step by step."""

from dataclasses import FrozenInstanceError

import pytest

from modeling_mfn.training.schedules import Schedule, resolve_steps


def test_schedules():
    assert [Schedule(0.0, 1.0, 4).at(step) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert Schedule(0.3, 0.8, 0).at(0) == 0.8
    assert [Schedule(1.0, 0.0, 2, begin=3).at(step) for step in range(6)] == [1, 1, 1, 1, 0.5, 0]
    assert [Schedule(1.0, 0.0, 0, begin=2).at(step) for step in range(4)] == [1, 1, 0, 0]
    cosine = [Schedule(0.0, 1.0, 6, shape="cosine").at(step) for step in range(7)]
    assert cosine == pytest.approx([0, 0.0669873, 0.25, 0.5, 0.75, 0.9330127, 1])


def test_a_schedule_does_not_change():
    schedule = Schedule(0.0, 1.0, 4)
    with pytest.raises(FrozenInstanceError):
        schedule.end = 0.5


def test_amounts_up_to_1_are_shares():
    assert [resolve_steps(amount, 50) for amount in (0, 0.5, 1, 1.5, 10)] == [0, 25, 50, 1.5, 10]

"""Seconds by phase: nested phases count once, and add up."""

import itertools

import pytest

import ptq.clock
from ptq.clock import Clock


@pytest.fixture
def clock(monkeypatch):
    """A clock whose time goes on by one second, and its processor's by two, whenever it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(ptq.clock, "_now", lambda: (float(tick := next(ticks)), 2.0 * tick))
    return Clock()


def test_a_phase_inside_another_counts_for_itself_alone(clock):
    with clock.phase("solve"):
        with clock.phase("scales"):
            pass
        with clock.phase("scales"):
            pass
    with clock.phase("write"):
        pass
    assert dict(clock.seconds) == {"solve": 3, "scales": 2, "write": 1}
    assert dict(clock.processor) == {"solve": 6, "scales": 4, "write": 2}
    assert clock.total == 9  # read nine times by now


def test_a_phase_that_fails_is_counted_and_closed(clock):
    with pytest.raises(ValueError), clock.phase("solve"), clock.phase("scales"):
        raise ValueError
    with clock.phase("write"):
        pass
    assert dict(clock.seconds) == {"solve": 2, "scales": 1, "write": 1}

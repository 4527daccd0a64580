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


def test_threads_book_to_their_own_phases(clock, monkeypatch):
    """Two threads compute 10 and 20 seconds side by side: of what passed, each phase has half of its thread's time."""
    times = iter([(0.0, 0.0)] * 3 + [(10.0, 10.0), (0.0, 0.0), (20.0, 20.0)])
    monkeypatch.setattr(ptq.clock, "_now_of_thread", lambda: next(times))
    with clock.phase("solve"), clock.threads(2) as (one, other):
        with one.phase("scales"):
            pass
        with other.phase("refine"):
            pass
    assert dict(clock.seconds) == {"solve": 2 - 15, "scales": 5, "refine": 10}
    assert dict(clock.processor) == {"solve": 4 - 30, "scales": 10, "refine": 20}

"""Where the time of a run goes, by phase."""

import time
from collections import defaultdict
from contextlib import contextmanager


class Clock:
    """Seconds by phase. A phase inside another counts for itself alone, so that the phases add up.

    Attributes:
        seconds: What passed.
        processor: What this process computed meanwhile, all threads together: more than passed with several threads,
            less where it waited for a disk or for other processes.
    """

    def __init__(self, now=None):
        self._now = now or _now
        self.start = self._last = self._now()
        self.seconds: dict[str, float] = defaultdict(float)
        self.processor: dict[str, float] = defaultdict(float)
        self._open: list[str] = []

    @contextmanager
    def phase(self, name: str):
        """Adds the time spent inside to a phase."""
        self._book()
        self._open.append(name)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def _book(self):
        """Gives the time since the last call to the innermost open phase."""
        now = self._now()
        if self._open:
            for spent, before, after in zip((self.seconds, self.processor), self._last, now, strict=True):
                spent[self._open[-1]] += after - before
        self._last = now

    @contextmanager
    def threads(self, count: int):
        """Gives clocks for threads that work side by side, one each.

        What they book goes to their phases instead of this clock's open one; of the seconds that passed each thread
        has its share.
        """
        clocks = [Clock(_now_of_thread) for _ in range(count)]
        try:
            yield clocks
        finally:
            self._book()
            for spent, name in ((self.seconds, "seconds"), (self.processor, "processor")):
                for phase, value in (item for clock in clocks for item in getattr(clock, name).items()):
                    share = value / count if name == "seconds" else value
                    spent[phase] += share
                    if self._open:
                        spent[self._open[-1]] -= share

    @property
    def total(self) -> float:
        """Seconds since the clock was made."""
        return self._now()[0] - self.start[0]

    @property
    def total_processor(self) -> float:
        """The processor's, since the clock was made."""
        return self._now()[1] - self.start[1]


def _now():
    return time.perf_counter(), time.process_time()


def _now_of_thread():
    return time.perf_counter(), time.thread_time()

"""Where the time of a run goes, by phase."""

import time
from collections import defaultdict
from contextlib import contextmanager


class Clock:
    """Seconds by phase; phases do not nest."""

    def __init__(self):
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str):
        """Adds the time spent inside to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    @property
    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.start

"""Where the time of a run goes, by phase, and the most memory it took."""

import resource
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch


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


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: the process's peak resident memory, and the GPU's peak where one was used."""
    peak = {"resident": _peak_resident()}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak


def _peak_resident() -> int:
    try:  # exact; getrusage's figure starts from the parent's at the time of the fork
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""What this machine does at best, measured with the thread count in force: products, copies, the disk."""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from calibration.processor import has_bf16_units
from calibration.products import bf16_products, factor

SIDE = 2048  # of the square matrices multiplied: in cache, large enough for the library's full speed
COPIED = 1 << 25  # numbers: several times the last cache
FILE_BYTES = 1 << 28
ATTEMPTS = 5


@dataclass(frozen=True)
class Rates:
    """What is done in a second.

    Attributes:
        products: Operations of fp32 products.
        walk: Operations of the walk's products of two matrices: of bf16 where the processor has instructions for them.
        memory: Bytes read and written in memory.
        disk_read: Bytes.
        disk_write: Bytes.
    """

    products: float
    walk: float
    memory: float
    disk_read: float
    disk_write: float


def measure_rates(folder: Path) -> Rates:
    """The best of a few attempts each.

    Args:
        folder: On the disk that is meant; a file is written there and removed.
    """
    a, b = torch.randn(2, SIDE, SIDE)
    source, copy = torch.zeros(2, COPIED)
    products = 2 * SIDE**3 / _best(lambda: torch.mm(a, b))
    with bf16_products(has_bf16_units()):
        a, b = factor(a), factor(b)
        walk = 2 * SIDE**3 / _best(lambda: torch.mm(a, b))
    memory = 2 * source.nbytes / _best(lambda: copy.copy_(source))
    return Rates(products, walk, memory, *_disk(folder))


def timer():
    """Seconds of arithmetic: with one thread the processor's, which other work on the machine does not lengthen."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _best(work) -> float:
    now, best = timer(), float("inf")
    for _ in range(ATTEMPTS):
        start = now()
        work()
        best = min(best, now() - start)
    return best


def _disk(folder):
    """(read, write) in bytes a second: written and synced; read after the system was told to forget it."""
    data = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(FILE_BYTES // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        write = FILE_BYTES / (time.perf_counter() - start)
        forget(file.fileno())
        file.seek(0)
        start = time.perf_counter()
        while file.read(len(data)):
            pass
        return FILE_BYTES / (time.perf_counter() - start), write


def forget(descriptor: int):
    """Asks the system to drop its copy of a file in memory, where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

"""The most memory a run took, and giving back what it no longer needs."""

import ctypes
import resource
from contextlib import contextmanager
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's numbers of the options
LARGE = 8 << 20  # less would let the solver's many temporaries fault their pages in again and again
HELD = 16 << 20  # free pages at the heap's end that are kept: without, every large temporary's are new ones
IN_FORWARDS = 16 << 20, 32 << 20
IN_TRAINING = 32 << 20, 512 << 20  # glibc's largest, and all that a step of a large block makes anew


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: the process's peak resident memory, and the GPU's peak where one was used."""
    peak = {"resident": _peak_resident()}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak


def resident_memory() -> int:
    """Bytes the process has in memory now."""
    return _status("VmRSS")


def _peak_resident() -> int:
    return _status("VmHWM")  # getrusage's figure starts from the parent's at the time of the fork


def _status(field) -> int:
    try:
        return 1024 * int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def return_large_blocks() -> None:
    """Lets every block of LARGE bytes or more go back to the system as soon as it is freed, smaller ones not at once.

    glibc moves its own limit up to 32 MB once such a block has been freed, and keeps those below it.
    """
    _limit(LARGE, HELD)


@contextmanager
def large_blocks_kept(limits: tuple[int, int] = IN_FORWARDS):
    """While it is open, larger ones are kept as well, for what makes blocks of the same sizes again and again.

    Whoever opens it calls `release_freed` meanwhile, where sizes change. In the end all goes back.

    Args:
        limits: Bytes: blocks below the first are kept, free ones at the heap's end up to the second.
    """
    _limit(*limits)
    try:
        yield
    finally:
        return_large_blocks()
        release_freed()


def _limit(large, held):
    try:
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, large)
        library.mallopt(M_TRIM_THRESHOLD, held)
    except (AttributeError, OSError, TypeError):  # not glibc
        pass


def release_freed() -> None:
    """Gives freed heap pages back to the system.

    glibc keeps freed blocks of up to 32 MB for later use, between blocks that live on; a walk frees many such, of many
    sizes, and its resident memory would drift some hundred megabytes above what is in use.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        pass

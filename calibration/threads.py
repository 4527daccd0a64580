"""Compiled loops that release Python's lock, shared out over torch's number of threads."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

STEP = 64  # rows: a whole number of vectors


def over_rows(kernel, rows: int, *arguments, step: int = STEP, least: int = 0):
    """kernel(first, last, *arguments) on all rows, each thread its share of whole steps.

    Args:
        kernel: The loop.
        rows: How many.
        *arguments: Passed on.
        step: Rows of which no two threads get a part.
        least: Fewer rows than this are not worth another thread.
    """
    threads = min(torch.get_num_threads(), -(-rows // max(least, step)))
    if threads == 1:
        kernel(0, rows, *arguments)
        return
    share = -(-rows // (threads * step)) * step
    parts = range(0, rows, share)
    list(_pool(threads).map(lambda first: kernel(first, min(first + share, rows), *arguments), parts))


@cache
def _pool(threads):
    """Starting threads takes longer than some loops."""
    return ThreadPoolExecutor(threads)


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of them

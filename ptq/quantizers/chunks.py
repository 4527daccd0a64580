"""Rows of a stage, some at a time: once the Hessian is factored they are independent, so threads share them out.

A thread of its own for each chunk uses a CPU better than threads inside every operator, which are called by the
hundred thousand on matrices of half a megabyte.
"""

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch

ROWS = 32  # rows are cut at multiples of this: sums run over whole vectors then, and the bits do not depend on the cuts
CHUNK = 1 << 20  # weights worked on at once by a thread: a dozen matrices of this size are alive
AT_ONCE = 1 << 21  # and by all threads


def threads_of(device: torch.device) -> int:
    """How many chunks are worked on at once."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def chunk_size(threads: int) -> int:
    """Weights of a chunk."""
    return min(CHUNK, AT_ONCE // threads)


def row_chunks(weights, rows, limit):
    """fp32 rows of the stacked matrices, a multiple of ROWS that `limit` weights allow at a time."""
    step = max(1, limit // weights[0].shape[1] // ROWS) * ROWS
    for first in range(rows.start, rows.stop, step):
        last, chunk, passed = min(first + step, rows.stop), [], 0
        for W in weights:
            chunk.append(W[max(0, first - passed) : max(0, last - passed)].float())
            passed += len(W)
        yield torch.cat(chunk)


def over_chunks(function, chunks, clock, threads: int) -> list:
    """[function(clock, *chunk) for chunk in chunks], by several threads; chunks are taken when a thread is free.

    The threads' operators run on one thread each, without gradients.
    """
    if threads == 1:
        return [function(clock, *chunk) for chunk in chunks]
    source, lock, results = enumerate(chunks), Lock(), {}

    def work(own):
        with torch.no_grad():
            while True:
                with lock:
                    k, chunk = next(source, (None, None))
                if chunk is None:
                    return
                results[k] = function(own, *chunk)

    try:
        with (
            clock.threads(threads) as clocks,
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            list(pool.map(work, clocks))
    finally:
        torch.set_num_threads(threads)
    return [results[k] for k in range(len(results))]

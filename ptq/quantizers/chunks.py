"""Rows of a stage, some at a time: once the Hessian is factored they are independent, so threads share them out.

A thread of its own for each chunk uses a CPU better than threads inside every operator, which are called by the
hundred thousand on matrices of half a megabyte.
"""

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch

from ptq.memory import release_freed

ROWS = 32  # rows are cut at multiples of this: sums run over whole vectors then, and the bits do not depend on the cuts
CHUNK = 1 << 20  # weights worked on at once by a thread: a dozen matrices of this size are alive
AT_ONCE = 1 << 21  # and by all threads
RELEASE_EVERY = 2  # chunks: what they freed lies between what is alive, and was a tenth of a small peak
COUPLED_ROWS, COUPLED_WEIGHTS = 2048, CHUNK  # of a run whose rows are solved together


def threads_of(device: torch.device) -> int:
    """How many chunks are worked on at once."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def chunk_size(threads: int, *, small: bool = False) -> int:
    """Weights of a chunk; half of them where memory is short."""
    return min(CHUNK, AT_ONCE // threads) // (2 if small else 1)


def row_cuts(rows: slice, in_features: int, limit: int) -> list[slice]:
    """Rows in runs of a multiple of ROWS that `limit` weights allow."""
    step = max(1, limit // in_features // ROWS) * ROWS
    return [slice(first, min(first + step, rows.stop)) for first in range(rows.start, rows.stop, step)]


def coupled_cuts(out_features: int, in_features: int) -> list[slice]:
    """Rows in runs of about one length whose errors are weighed against each other (coupled.py)."""
    limit = max(ROWS, min(COUPLED_ROWS, COUPLED_WEIGHTS // in_features) // ROWS * ROWS)
    runs = -(-out_features // limit)
    return row_cuts(slice(0, out_features), 1, -(-out_features // (runs * ROWS)) * ROWS)


def row_chunks(weights, cuts):
    """fp32 rows of the stacked matrices, run by run; transposed, (I, O)."""
    for cut in cuts:
        chunk, passed = [], 0
        for W in weights:
            chunk.append(W[max(0, cut.start - passed) : max(0, cut.stop - passed)].float())
            passed += len(W)
        yield torch.cat(chunk).T.contiguous()


def over_chunks(function, chunks, clock, threads: int) -> list:
    """[function(clock, *chunk) for chunk in chunks], by several threads; chunks are taken when a thread is free.

    The threads' operators run on one thread each, without gradients.
    """
    source, lock, results = enumerate(chunks), Lock(), {}

    def take(own):
        """Whether there was one more."""
        with lock:
            k, chunk = next(source, (None, None))
        if chunk is None:
            return False
        results[k] = function(own, *chunk)
        if k % RELEASE_EVERY == RELEASE_EVERY - 1:
            release_freed()
        return True

    def work(own):
        with torch.no_grad():
            while take(own):
                pass

    if threads == 1:
        work(clock)
        return [results[k] for k in range(len(results))]
    try:
        with (
            clock.threads(threads) as clocks,
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            list(pool.map(work, clocks))
    finally:
        torch.set_num_threads(threads)
    return [results[k] for k in range(len(results))]

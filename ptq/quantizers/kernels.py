"""The two column loops compiled for a CPU: GPTQ's, and coordinate descent's. Same steps as the loops of operators.

A column's step is a dozen operators on a few hundred numbers each, so operators spend their time on being called. Here
some rows go through all columns before the next ones start: their numbers stay in the first cache. Rows are shared out
over torch's number of threads. The loops of operators remain: for GPUs, for fp64, and as what these are tested against.

Legend: c columns of a block, O outputs (rows), n (scale, zero) pairs; matrices are transposed, (c, O).
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit

TILE = 64  # rows at once: the cache holds (c, TILE) numbers, and a tile is a whole number of vectors
EVEN, RAMP, TABLE = range(3)
KINDS = {"even": EVEN, "ramp": RAMP, "table": TABLE}


def compiled(tensor: torch.Tensor) -> bool:
    """Whether the compiled loops take a tensor."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def round_block(target, Wt, M, diagonal, scale, zero, step, arithmetic):
    """GPTQ inside a block of columns.

    Args:
        target: (c, O) what the first column shall be rounded to and, but for the errors made in this block, the others.
        Wt: (c, O) weights.
        M: (c, c) row k: the share of column k's error that each later column takes over.
        diagonal: (c,) of U.
        scale: (n, O).
        zero: (n, O).
        step: c indices into scale and zero.
        arithmetic: The grid's Arithmetic.

    Returns:
        codes (c, O), Q (c, O), and the loss of each row (O,).
    """
    codes, Q, loss = torch.empty_like(Wt), torch.empty_like(Wt), torch.zeros(Wt.shape[1])
    arrays = _arrays(target, Wt, M, diagonal, codes, Q, loss, scale, zero)
    _over_rows(_round_block, Wt.shape[1], *arrays, np.asarray(step, np.int64), *_levels(arithmetic))
    return codes, Q, loss


def sweep_block(inner, gradient, D, target, codes, scale, zero, step, arithmetic):
    """Coordinate descent over a block's codes, in place in D and codes.

    Args:
        inner: (c, c) the Hessian's part, columns in the order in which they are visited.
        gradient: (c, O) D H on these columns, before the pass; left as it is.
        D: (c, O) values minus target.
        target: (c, O).
        codes: (c, O).
        scale: (n, O).
        zero: (n, O).
        step: c indices into scale and zero.
        arithmetic: The grid's Arithmetic.
    """
    arrays = _arrays(inner, gradient, D, target, codes, scale, zero)
    _over_rows(_sweep_block, D.shape[1], *arrays, np.asarray(step, np.int64), *_levels(arithmetic))


def _arrays(*tensors):
    assert all(tensor.is_contiguous() for tensor in tensors)
    return [tensor.numpy() for tensor in tensors]


def _levels(arithmetic):
    """Kind, largest code, the table, and the nearest code of every half from its first to its last entry."""
    table = np.asarray(arithmetic.table or (0,), np.float32)
    halves = np.arange(2 * table[0], 2 * table[-1] + 1) / 2
    nearest = np.searchsorted((table[1:] + table[:-1]) / 2, halves).astype(np.float32)
    return KINDS[arithmetic.kind], np.float32(arithmetic.top), table, nearest


def _over_rows(kernel, rows, *arguments):
    threads = min(torch.get_num_threads(), -(-rows // TILE))
    if threads == 1:
        kernel(0, rows, *arguments)
        return
    share = -(-rows // (threads * TILE)) * TILE
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda first: kernel(first, min(first + share, rows), *arguments), range(0, rows, share)))


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _nearest_code(w, scale, zero, kind, top, table, nearest):
    safe = scale if scale != 0 else np.float32(1)
    if kind == EVEN:
        return min(max(np.rint(w / safe + zero), np.float32(0)), top)
    if kind == RAMP:
        return min(max(np.rint((w + zero) / safe), np.float32(0)), top)
    half = min(max(np.ceil(np.float32(2) * (w / safe)), np.float32(2) * table[0]), np.float32(2) * table[-1])
    return nearest[int(half - np.float32(2) * table[0])]


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _value(code, scale, zero, kind, table):
    if kind == EVEN:
        return scale * (code - zero)
    if kind == RAMP:
        return scale * code - zero
    return scale * table[int(code)]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _round_block(first, last, target, Wt, M, diagonal, codes, Q, loss, scale, zero, step, kind, top, table, nearest):
    columns = len(diagonal)
    held, D = np.empty((columns, TILE), np.float32), np.empty(TILE, np.float32)
    for start in range(first, last, TILE):
        rows = min(TILE, last - start)
        for k in range(columns):
            for r in range(rows):
                held[k, r] = target[k, start + r]
        for k in range(columns):
            s = step[k]
            for r in range(rows):
                o = start + r
                code = _nearest_code(held[k, r], scale[s, o], zero[s, o], kind, top, table, nearest)
                value = _value(code, scale[s, o], zero[s, o], kind, table)
                codes[k, o], Q[k, o] = code, value
                error = (value - held[k, r]) * diagonal[k]
                loss[o] += error * error
                D[r] = value - Wt[k, o]
            for later in range(k + 1, columns):
                m = M[k, later]
                for r in range(rows):
                    held[later, r] -= m * D[r]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _sweep_block(first, last, inner, gradient, D, target, codes, scale, zero, step, kind, top, table, nearest):
    columns = len(inner)
    held, change = np.empty((columns, TILE), np.float32), np.empty(TILE, np.float32)
    for start in range(first, last, TILE):
        rows = min(TILE, last - start)
        for k in range(columns):
            for r in range(rows):
                held[k, r] = gradient[k, start + r]
        for j in range(columns):
            s, curvature = step[j], inner[j, j]
            for r in range(rows):
                o = start + r
                best = (D[j, o] + target[j, o]) - held[j, r] / curvature
                code = _nearest_code(best, scale[s, o], zero[s, o], kind, top, table, nearest)
                value = _value(code, scale[s, o], zero[s, o], kind, table) - target[j, o]
                change[r] = value - D[j, o]
                codes[j, o], D[j, o] = code, value
            for later in range(j + 1, columns):
                h = inner[j, later]
                for r in range(rows):
                    held[later, r] += h * change[r]

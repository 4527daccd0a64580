"""The two column loops compiled for a CPU: GPTQ's, and coordinate descent's. Same steps as the loops of operators.

A column's step is a dozen operators on a few hundred numbers each, so operators spend their time on being called. Here
some rows go through all columns before the next ones start: their numbers stay in the first cache. The loops of
operators remain: for GPUs, for fp64, and as what these are tested against.

Legend: c columns of a block, O outputs (rows), n (scale, zero) pairs; matrices are transposed, (c, O).
"""

import numpy as np
import torch
from numba import njit

from ptq.grids.compiled import TILE, arrays, levels, nearest_code, over_rows, value_of


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
    given = arrays(target, Wt, M, diagonal, codes, Q, loss, scale, zero)
    over_rows(_round_block, Wt.shape[1], *given, np.asarray(step, np.int64), *levels(arithmetic))
    return codes, Q, loss


def sweep_block(inner, target, codes, D, gradient, scale, zero, step, arithmetic, order):
    """Coordinate descent over some of a span's codes, in place in D and codes.

    Args:
        inner: (c, c) the Hessian's part.
        target: (c, O).
        codes: (c, O).
        D: (c, O) values minus target.
        gradient: (c, O) D H on these columns, before the pass; left as it is.
        scale: (n, O).
        zero: (n, O).
        step: c indices into scale and zero.
        arithmetic: The grid's Arithmetic.
        order: The columns that are visited.

    Returns:
        (O,) what the loss went down by.
    """
    gained = torch.zeros(D.shape[1])
    given = arrays(inner, target, codes, D, gradient, scale, zero, order, gained)
    over_rows(_sweep_block, D.shape[1], *given, np.asarray(step, np.int64), *levels(arithmetic))
    return gained


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
                code = nearest_code(held[k, r], scale[s, o], zero[s, o], kind, top, table, nearest)
                value = value_of(code, scale[s, o], zero[s, o], kind, table)
                codes[k, o], Q[k, o] = code, value
                error = (value - held[k, r]) * diagonal[k]
                loss[o] += error * error
                D[r] = value - Wt[k, o]
            for later in range(k + 1, columns):
                m = M[k, later]
                for r in range(rows):
                    held[later, r] -= m * D[r]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _sweep_block(
    first, last, inner, target, codes, D, gradient, scale, zero, order, gained, step, kind, top, table, nearest
):
    columns = len(order)
    held, change = np.empty((columns, TILE), np.float32), np.empty(TILE, np.float32)
    for start in range(first, last, TILE):
        rows = min(TILE, last - start)
        for k in range(columns):
            for r in range(rows):
                held[k, r] = gradient[order[k], start + r]
        for k in range(columns):
            j = order[k]
            s, curvature = step[j], inner[j, j]
            for r in range(rows):
                o = start + r
                best = (D[j, o] + target[j, o]) - held[k, r] / curvature
                code = nearest_code(best, scale[s, o], zero[s, o], kind, top, table, nearest)
                value = value_of(code, scale[s, o], zero[s, o], kind, table) - target[j, o]
                change[r] = value - D[j, o]
                gained[o] -= change[r] * (np.float32(2) * held[k, r] + change[r] * curvature)
                codes[j, o], D[j, o] = code, value
            for later in range(k + 1, columns):
                h = inner[j, order[later]]
                for r in range(rows):
                    held[later, r] += h * change[r]

"""The two column loops compiled for a CPU: GPTQ's, and coordinate descent's. Same steps as the loops of operators.

A column's step is a dozen operators on a few hundred numbers each, so operators spend their time on being called. Here
some rows go through all columns before the next ones start: their numbers stay in the first cache. The loops of
operators remain: for GPUs, for fp64, and as what these are tested against.

Legend: c columns of a block, O outputs (rows), n (scale, zero) pairs; matrices are transposed, (c, O).
"""

import numpy as np
import torch
from numba import njit

from calibration.threads import over_rows
from ptq.grids.compiled import EVEN, TILE, arrays, even_code, even_value, levels, nearest_code, value_of

PANEL = 8  # columns whose errors are spread at once to those further on


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


# Loops over a tile's rows are vectorised where they read and write views of rows and ask for the kind outside.


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _round_block(first, last, target, Wt, M, diagonal, codes, Q, loss, scale, zero, step, kind, top, table, nearest):
    columns, shares = len(diagonal), np.empty(PANEL, np.float32)
    held, off = np.empty((columns, TILE), np.float32), np.empty((PANEL, TILE), np.float32)
    for start in range(first, last, TILE):
        rows = min(TILE, last - start)
        tile = slice(start, start + rows)
        lost = loss[tile]
        for k in range(columns):
            given, x = target[k, tile], held[k]
            for r in range(rows):
                x[r] = given[r]
        for panel in range(0, columns, PANEL):
            end = min(panel + PANEL, columns)
            for k in range(panel, end):
                s, weight, x, d = step[k], diagonal[k], held[k], off[k - panel]
                w, c, q, S, Z = Wt[k, tile], codes[k, tile], Q[k, tile], scale[s, tile], zero[s, tile]
                if kind == EVEN:
                    for r in range(rows):
                        code = even_code(x[r], S[r], Z[r], top)
                        c[r], q[r] = code, even_value(code, S[r], Z[r])
                else:
                    for r in range(rows):
                        code = nearest_code(x[r], S[r], Z[r], kind, top, table, nearest)
                        c[r], q[r] = code, value_of(code, S[r], Z[r], kind, table)
                for r in range(rows):
                    error = (q[r] - x[r]) * weight
                    lost[r] += error * error
                    d[r] = w[r] - q[r]
                for later in range(k + 1, end):
                    y, share = held[later], M[k, later]
                    for r in range(rows):
                        y[r] += share * d[r]
            for later in range(end, columns):
                for p in range(PANEL):
                    shares[p] = M[panel + p, later]
                _add_panel(held, later, shares, off, rows)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _sweep_block(
    first, last, inner, target, codes, D, gradient, scale, zero, order, gained, step, kind, top, table, nearest
):
    columns, shares, new = len(order), np.empty(PANEL, np.float32), np.empty(TILE, np.float32)
    held, change = np.empty((columns, TILE), np.float32), np.empty((PANEL, TILE), np.float32)
    for start in range(first, last, TILE):
        rows = min(TILE, last - start)
        tile = slice(start, start + rows)
        won = gained[tile]
        for k in range(columns):
            given, x = gradient[order[k], tile], held[k]
            for r in range(rows):
                x[r] = given[r]
        for panel in range(0, columns, PANEL):
            end = min(panel + PANEL, columns)
            for k in range(panel, end):
                j = order[k]
                s, curvature, x, turned = step[j], inner[j, j], held[k], change[k - panel]
                t, c, d, S, Z = target[j, tile], codes[j, tile], D[j, tile], scale[s, tile], zero[s, tile]
                if kind == EVEN:
                    for r in range(rows):
                        code = even_code((d[r] + t[r]) - x[r] / curvature, S[r], Z[r], top)
                        c[r], new[r] = code, even_value(code, S[r], Z[r])
                else:
                    for r in range(rows):
                        best = (d[r] + t[r]) - x[r] / curvature
                        code = nearest_code(best, S[r], Z[r], kind, top, table, nearest)
                        c[r], new[r] = code, value_of(code, S[r], Z[r], kind, table)
                for r in range(rows):
                    value = new[r] - t[r]
                    turned[r] = value - d[r]
                    won[r] -= turned[r] * (np.float32(2) * x[r] + turned[r] * curvature)
                    d[r] = value
                for later in range(k + 1, end):
                    y, share = held[later], inner[j, order[later]]
                    for r in range(rows):
                        y[r] += share * turned[r]
            for later in range(end, columns):
                for p in range(PANEL):
                    shares[p] = inner[order[panel + p], order[later]]
                _add_panel(held, later, shares, change, rows)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"}, inline="always")
def _add_panel(held, later, shares, panel, count):
    """held[later] += shares * panel, of PANEL rows one after the other while a number is at hand."""
    a, b, c, d, e, f, g, h = shares[0], shares[1], shares[2], shares[3], shares[4], shares[5], shares[6], shares[7]
    for r in range(count):
        x = held[later, r]
        x += a * panel[0, r]
        x += b * panel[1, r]
        x += c * panel[2, r]
        x += d * panel[3, r]
        x += e * panel[4, r]
        x += f * panel[5, r]
        x += g * panel[6, r]
        x += h * panel[7, r]
        held[later, r] = x

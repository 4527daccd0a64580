"""The solver where outputs depend on each other: minimises tr(H_O D H D^T) over all rows of D = Q - W together.

H_O = E[g g^T] is the second moment of the loss's gradient in a linear's outputs (its Fisher information); with H it
makes up the curvature of the loss in the weights, as a Kronecker product (K-FAC, arXiv 1503.05671; YAQA, arXiv
2505.22988, rounds under it). Where H_O is diagonal, rows are independent and this is columns.py and refine.py.

Rounding: with H = U U^T and H_O = V V^T, both factors upper triangular, M = U / diag(U) and N = V / diag(V), columns
and rows in the order in which they are rounded,

    tr(H_O D H D^T) = sum_k sum_p (U_kk V_pp)^2 (e_pk + sum_{o<p} e_ok N_op)^2,   e_pk = d_pk + sum_{j<k} d_pj M_jk,

and all brackets vanish where q_pk = w_pk - sum_{j<k} d_pj M_jk - sum_{o<p} e_ok N_op: round that, column by column and,
in a column, row by row (YAQA's theorem 1 has the same feedback).

Refinement: coordinate descent with the gradient H D H_O, codes one by one; a span's stored numbers by some rows at a
time, each to the best value with all others fixed, taken where together they lower the loss.

The loops over codes are compiled for a CPU; matrices on a GPU come to it.

Legend: O outputs (rows), I inputs, c columns of a block or span; matrices are transposed, (I, O).
"""

import numpy as np
import torch
from numba import njit

from ptq.grids.compiled import arrays, levels, nearest_code, value_of
from ptq.quantizers.columns import damped_factor
from ptq.quantizers.refine import TINY, values

TURNED = 32
FISHER_DAMP = 0.3  # added to H_O, as a share of its mean diagonal
SMALL = 1e-6


def normalised(HO):
    """H_O (O, O), damped, its mean diagonal 1 before; the identity where no gradient arrived."""
    mean = float(HO.diagonal().mean())
    eye = torch.eye(len(HO), dtype=HO.dtype, device=HO.device)
    return HO / mean + FISHER_DAMP * eye if mean > 0 else eye


def quantize_coupled(Wt, U, HO, grid, params, *, column_block=128):
    """Rounds all rows of a matrix, each column's and each row's error made up for by those that follow.

    Args:
        Wt: (I, O) target weights, columns in the order in which they are rounded.
        U: (I, I) upper triangular factor of the damped Hessian in the same order.
        HO: (O, O) from `normalised`; rows are rounded by falling diagonal.
        grid: Gives decode and arithmetic.
        params: FixedParams of the columns in that order.
        column_block: Columns between two matrix products.

    Returns:
        (I, O) codes as floats.
    """
    order = HO.diagonal().argsort(descending=True, stable=True)
    V, _ = damped_factor(HO.clone(), SMALL, order)
    N = (V / V.diagonal()).contiguous()
    Wt, scale, zero = (x[:, order].contiguous() for x in (Wt, params.scale, params.zero))
    codes, D, diagonal = torch.empty_like(Wt), torch.empty_like(Wt), U.diagonal()
    for start in range(0, len(Wt), column_block):
        block = slice(start, min(start + column_block, len(Wt)))
        M = U[: block.stop, block] / diagonal[block]
        known = M[:start].T @ D[:start]
        given = arrays(known, Wt[block], M[start:].contiguous(), N, codes[block], D[block], scale, zero)
        _round(*given, np.asarray(params.step[block], np.int64), *levels(grid.arithmetic))
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result


def refine_coupled(Wt, H, HO, codes, spans, params, grid, *, rounds, generator):
    """Improves codes and params, in place.

    Args:
        Wt: (I, O) target.
        H: (I, I) damped.
        HO: (O, O) from `normalised`.
        codes: (I, O), overwritten.
        spans: Span list.
        params: Of every span, overwritten.
        grid: Gives steps, decode, arithmetic and knobs.
        rounds: Passes over all spans.
        generator: Draws the order of spans, of their columns and of rows.
    """
    D = errors(Wt, codes, spans, params, grid)
    for _ in range(rounds):
        for s in torch.randperm(len(spans), generator=generator).tolist():
            local = _Coupled(Wt, H, HO, codes, D, spans[s])
            local.refit(grid, params[s], generator)
            local.sweep(grid, params[s], generator)


def errors(Wt, codes, spans, params, grid):
    """D (I, O)."""
    D = torch.empty_like(Wt)
    for span, numbers in zip(spans, params, strict=True):
        torch.sub(values(grid, numbers, span, codes[span.columns]), Wt[span.columns], out=D[span.columns])
    return D


def coupled_loss(D, H, HO):
    """(O,) each row's part of tr(H_O D H D^T); a part may be negative, the sum is not."""
    return ((H @ D) * (D @ HO)).sum(0)


class _Coupled:
    """One span's share of the problem: views of its rows of every matrix, and its gradient H D H_O."""

    def __init__(self, Wt, H, HO, codes, D, span):
        self.HO, self.span = HO, span
        rows = H[span.columns]
        self.inner, self.gradient = rows[:, span.columns].contiguous(), (rows @ D) @ HO
        self.target, self.codes, self.D = Wt[span.columns], codes[span.columns], D[span.columns]

    def refit(self, grid, numbers, generator):
        """Each stored number to its best value, codes fixed; a number and its partner one after the other."""
        for knob in grid.knobs(numbers, self.codes, self.span.step):
            for turned in (knob,) if knob.partner is None else (knob, knob.partner):
                self._turn(turned, generator)
        torch.sub(values(grid, numbers, self.span, self.codes), self.target, out=self.D)

    def _turn(self, knob, generator):
        direction = knob.direction
        bent = self.inner[:, knob.columns] @ direction
        own = (direction * bent[knob.columns]).sum(0).clamp_(min=TINY)
        best = knob.number.clone()
        for rows in torch.randperm(len(own), generator=generator).to(own.device).split(TURNED):
            HO = self.HO[rows]
            slope = (direction[:, rows] * self.gradient[knob.columns][:, rows]).sum(0)
            best.copy_(knob.number)
            best[rows] -= slope / (own[rows] * HO[:, rows].diagonal())
            change = knob.storable(best)[rows] - knob.number[rows]
            change = torch.where(change.isnan(), 0, change)
            moved = bent[:, rows] * change
            within = (direction[:, rows] * change).T @ moved[knob.columns]
            if 2 * (slope * change).sum() + (within * HO[:, rows]).sum() < 0:
                knob.number[rows] += change
                self.gradient.addmm_(moved, HO)

    def sweep(self, grid, numbers, generator):
        """Coordinate descent over the span's codes, columns in random order."""
        scale, zero = (p.contiguous() for p in grid.steps(numbers))
        order = torch.randperm(len(self.inner), generator=generator)
        given = arrays(self.inner, self.target, self.codes, self.D, self.gradient, self.HO, scale, zero, order)
        _sweep(*given, np.asarray(self.span.step, np.int64), *levels(grid.arithmetic))


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
def _round(known, Wt, M, N, codes, D, scale, zero, step, kind, top, table, nearest):
    columns, outputs = Wt.shape
    fed = np.empty(outputs, np.float32)
    for k in range(columns):
        for j in range(k):
            m = M[j, k]
            for o in range(outputs):
                known[k, o] += m * D[j, o]
        fed[:] = 0
        s = step[k]
        for o in range(outputs):
            target = Wt[k, o] - known[k, o] - fed[o]
            code = nearest_code(target, scale[s, o], zero[s, o], kind, top, table, nearest)
            d = value_of(code, scale[s, o], zero[s, o], kind, table) - Wt[k, o]
            codes[k, o], D[k, o] = code, d
            error = known[k, o] + d
            for p in range(o + 1, outputs):
                fed[p] += N[o, p] * error


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
def _sweep(inner, target, codes, D, gradient, HO, scale, zero, order, step, kind, top, table, nearest):
    columns, outputs = D.shape
    turned = np.empty(outputs, np.float32)
    for k in range(columns):
        j = order[k]
        s, curvature, any_turned = step[j], inner[j, j], False
        turned[:] = 0
        for o in range(outputs):
            slope = gradient[j, o] + curvature * turned[o]
            best = (D[j, o] + target[j, o]) - slope / (curvature * HO[o, o])
            code = nearest_code(best, scale[s, o], zero[s, o], kind, top, table, nearest)
            if code == codes[j, o]:
                continue
            value = value_of(code, scale[s, o], zero[s, o], kind, table) - target[j, o]
            change = value - D[j, o]
            codes[j, o], D[j, o], any_turned = code, value, True
            for p in range(outputs):
                turned[p] += change * HO[o, p]
        if any_turned:
            for later in range(k + 1, columns):
                i = order[later]
                h = inner[i, j]
                for p in range(outputs):
                    gradient[i, p] += h * turned[p]

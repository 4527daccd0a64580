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
time, to the values that are best together with all else fixed, or each by itself where rounding spoils those: taken
where they lower the loss.

The loops over codes are compiled for a CPU; matrices on a GPU come to it.

Legend: O outputs (rows), I inputs, c columns of a block or span; matrices are transposed, (I, O).
"""

import numpy as np
import torch
from numba import njit

from calibration.products import factor
from ptq.grids.compiled import arrays, levels, nearest_code, value_of
from ptq.quantizers.columns import damped_factor
from ptq.quantizers.refine import TINY, values

TURNED = 128  # rows whose stored number moves at once
LOSS_TILE = 512  # columns of D H at once
ROW_BLOCK = 64  # rows between two matrix products
FISHER_DAMP = 0.3  # added to H_O, as a share of its mean diagonal
SMALL = 1e-6
REFIT_EVERY = 2  # rounds: a refit takes longer than a sweep, and half as many cost less than draws differ by (LOG.md)


def normalised(HO):
    """H_O (O, O), damped, its mean diagonal 1 before; the identity where no gradient arrived."""
    mean = float(HO.diagonal().mean())
    if not mean > 0:
        return torch.eye(len(HO), dtype=HO.dtype, device=HO.device)
    HO = HO / mean
    HO.diagonal().add_(FISHER_DAMP)
    return HO


def quantize_coupled(Wt, visited, U, HO, grid, params, *, column_block=128):
    """Rounds all rows of a matrix, each column's and each row's error made up for by those that follow.

    Args:
        Wt: (I, O) target weights.
        visited: (I,) columns in the order in which they are rounded.
        U: (I, I) upper triangular factor of the damped Hessian in that order.
        HO: (O, O) from `normalised`; rows are rounded by falling diagonal.
        grid: Gives decode and arithmetic.
        params: FixedParams of the columns in that order.
        column_block: Columns between two matrix products.

    Returns:
        (I, O) codes as floats.
    """
    order = HO.diagonal().argsort(descending=True, stable=True)
    V, _ = damped_factor(HO.clone(), SMALL, order)
    N = V.div_(V.diagonal().clone())
    Wt, scale, zero = (x[:, order].contiguous() for x in (Wt[visited], params.scale, params.zero))
    codes, D, diagonal = torch.empty_like(Wt), torch.zeros_like(Wt), U.diagonal()
    for start in range(0, len(Wt), column_block):
        block = slice(start, min(start + column_block, len(Wt)))
        M = U[:, block] / diagonal[block]
        known = M.T @ D  # and zeros, where D is not known yet: oneDNN keeps code and memory for every shape it meets
        brackets, step = torch.zeros_like(known), np.asarray(params.step[block], np.int64)
        given = arrays(known, Wt[block], M[block].contiguous(), codes[block], D[block], brackets, scale, zero)
        for first in range(0, len(HO), ROW_BLOCK):
            rows = slice(first, first + ROW_BLOCK)
            local = arrays(brackets @ N[:, rows], N[rows, rows].contiguous())
            _round(first, *given, *local, step, *levels(grid.arithmetic))
    del Wt, D, given
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
        rounds: Passes over all spans, of which every second leaves the stored numbers.
        generator: Draws the order of spans, of their columns and of rows.
    """
    D = errors(Wt, codes, spans, params, grid)
    factors = factor(HO), factor(D)
    for k in range(rounds):
        for s in torch.randperm(len(spans), generator=generator).tolist():
            local = _Coupled(Wt, H, HO, codes, D, spans[s], factors)
            if k % REFIT_EVERY == 0:
                local.refit(grid, params[s], generator)
            local.sweep(grid, params[s], generator)
            factors[1][spans[s].columns] = local.D


def errors(Wt, codes, spans, params, grid):
    """D (I, O)."""
    D = torch.empty_like(Wt)
    for span, numbers in zip(spans, params, strict=True):
        torch.sub(values(grid, numbers, span, codes[span.columns]), Wt[span.columns], out=D[span.columns])
    return D


def coupled_loss(D, H, HO):
    """(O,) each row's part of tr(H_O D H D^T); a part may be negative, the sum is not."""
    loss, weighed = D.new_zeros(D.shape[1]), D @ HO
    for start in range(0, len(D), LOSS_TILE):
        tile = slice(start, start + LOSS_TILE)
        loss += weighed[tile].mul_(H[tile] @ D).sum(0)
    return loss


class _Coupled:
    """One span's share of the problem: views of its rows of every matrix, and its gradient H D H_O."""

    def __init__(self, Wt, H, HO, codes, D, span, factors=None):
        self.HO, self.span = HO, span
        self.of_HO, of_D = factors or (factor(HO), factor(D))
        rows = H[span.columns]
        self.inner, self.gradient = rows[:, span.columns].contiguous(), ((factor(rows) @ of_D) @ self.of_HO).float()
        self.target, self.codes, self.D = Wt[span.columns], codes[span.columns], D[span.columns]

    def refit(self, grid, numbers, generator):
        """Each stored number to its best value, codes fixed; a number and its partner one after the other."""
        for knob in grid.knobs(numbers, self.codes, self.span.step):
            for turned in (knob,) if knob.partner is None else (knob, knob.partner):
                self._turn(turned, generator)
        torch.sub(values(grid, numbers, self.span, self.codes), self.target, out=self.D)

    def _turn(self, knob, generator):
        """A knob's numbers, some rows at a time: their curvature together is (direction^T H direction) * H_O."""
        bent = self.inner[:, knob.columns] @ knob.direction
        slope = (knob.direction * self.gradient[knob.columns]).sum(0)
        new, direction, pulled = knob.number.clone(), factor(knob.direction.T), factor(bent[knob.columns])
        for rows in _runs(len(slope), generator):
            number, curvature = knob.number[rows], (direction[rows] @ pulled).float().mul_(self.HO[rows])
            within = curvature[:, rows]
            within.diagonal().clamp_(min=TINY)
            joint = torch.linalg.solve_ex(within, slope[rows])[0]
            for step in (joint, slope[rows] / within.diagonal()):
                found = knob.storable(number - step)
                found = torch.where(found.isnan(), number, found)
                moved = (found - number) @ curvature
                if (found - number) @ (2 * slope[rows] + moved[rows]) < 0:
                    new[rows], slope = found, slope.add_(moved)
                    break
        self.gradient.add_(factor(bent.mul_(new - knob.number)) @ self.of_HO)
        knob.number.copy_(new)

    def sweep(self, grid, numbers, generator):
        """Coordinate descent over the span's codes, columns in random order."""
        scale, zero = (p.contiguous() for p in grid.steps(numbers))
        order = torch.randperm(len(self.inner), generator=generator)
        given = arrays(self.inner, self.target, self.codes, self.D, self.gradient, self.HO, scale, zero, order)
        _sweep(*given, np.asarray(self.span.step, np.int64), *levels(grid.arithmetic))


def _runs(count, generator):
    """Rows in runs of TURNED, in random order."""
    runs = range(0, count, TURNED)
    for k in torch.randperm(len(runs), generator=generator).tolist():
        yield slice(runs[k], min(runs[k] + TURNED, count))


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
def _round(
    first, known, Wt, M, codes, D, brackets, scale, zero, fed, N, step, kind, top, table, nearest
):  # fmt: skip
    """Rounds the rows from `first` on that `fed` (c, r) and N (r, r) are about, in the columns of a block."""
    columns, rows = fed.shape
    for k in range(columns):
        for j in range(k):
            m = M[j, k]
            for o in range(first, first + rows):
                known[k, o] += m * D[j, o]
        s = step[k]
        for r in range(rows):
            o = first + r
            code = nearest_code(Wt[k, o] - known[k, o] - fed[k, r], scale[s, o], zero[s, o], kind, top, table, nearest)
            d = value_of(code, scale[s, o], zero[s, o], kind, table) - Wt[k, o]
            codes[k, o], D[k, o], bracket = code, d, known[k, o] + d
            brackets[k, o] = bracket
            for p in range(r + 1, rows):
                fed[k, p] += N[r, p] * bracket


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

"""GPTQ: rounds columns one after the other, each made up for by the columns that follow.

Minimises tr(D H D^T), D = Q - W, over codes on a grid (Frantar et al., arXiv 2210.17323). The paper inverts H, factors
the inverse and updates the remaining weights; the same codes come from one Cholesky factor and no inverse. Write
H = U U^T with U upper triangular. Then

    tr(D H D^T) = sum_k || U_kk (d_k + sum_{j<k} d_j U_jk / U_kk) ||^2,        d_k the k-th column of D,

and the bracket vanishes where q_k = w_k - sum_{j<k} d_j U_jk / U_kk: round that target, column by column.
(QuIP, arXiv 2307.13304, theorem 6, shows that this is GPTQ.)

A worked example, O = 1, I = 2, whole numbers as the grid: H = [[2, 1], [1, 1]], W = [0.4, 0.4]. U = [[1, 1], [0, 1]],
so q_0 = round(0.4) = 0, d_0 = -0.4, the second target is 0.4 + 0.4 * 1 / 1 = 0.8 and q_1 = 1. Loss: 0.4^2 + 0.2^2,
that is 0.2, where plain rounding to (0, 0) leaves 0.8.

Legend: O outputs, I inputs, G groups. Matrices here are transposed, (I, O), so that a column is contiguous.
"""

from dataclasses import dataclass

import torch

from calibration.errors import InputError
from ptq.grids.compiled import compiled
from ptq.quantizers.kernels import round_block

DAMP_GROWTH = 4.0
DAMP_ATTEMPTS = 10
TURN_CHUNK = 1 << 20
PERMUTED_ROWS = 256


def damped_factor(H, damp_percent, order=None):
    """Damps H and factors it.

    Adds damp_percent of the mean diagonal, or more until the Cholesky factor exists. An input that was zero on every
    calibration token ("dead") ends with the damping alone on its diagonal and nothing beside it: its weights are
    rounded to nearest and weigh almost nothing in the search of the scales.

    Args:
        H: (I, I) symmetric, positive semi-definite up to rounding, or a SquareOnDisk; damped in place.
        damp_percent: First fraction to try.
        order: (I,) columns in the order in which they will be rounded; None where that is their own.

    Returns:
        U (I, I) upper triangular with U U^T = H, its columns in that order, and the fraction added.

    Raises:
        InputError: Nothing in DAMP_ATTEMPTS fractions, each DAMP_GROWTH times the last, makes H positive definite.
    """
    diagonal, info = H.diagonal(), torch.empty(0, dtype=torch.int32, device=H.device)
    order = torch.arange(len(H), device=H.device) if order is None else order
    mean = float(diagonal.contiguous().mean())  # summed in one order, wherever H lies
    mean = mean or 1.0  # every input dead: the identity, so plain rounding
    added = 0.0
    for _ in range(DAMP_ATTEMPTS):
        diagonal.add_((damp_percent - added) * mean)
        added = damp_percent
        # LAPACK factors as lower times upper: ours is the turned matrix's, turned. Symmetric, so columns may be rows.
        turned = permuted(H, order.flip(0)).T
        torch.linalg.cholesky_ex(turned, out=(turned, info))
        if int(info) == 0:
            return _turn(turned), added
        damp_percent *= DAMP_GROWTH
    raise InputError(f"the Hessian is not positive definite even with {added:g} of its mean diagonal added")


def permuted(H, order):
    """H[order][:, order], some rows at a time."""
    result = torch.empty(len(H), len(H), dtype=H.diagonal().dtype, device=H.device)
    for start in range(0, len(H), PERMUTED_ROWS):
        rows = slice(start, start + PERMUTED_ROWS)
        torch.index_select(H[order[rows]], 1, order, out=result[rows])
    return result


def _turn(matrix):
    """Reverses rows and columns, in place: the two halves of its memory, backwards, change places."""
    flat = matrix.as_strided((matrix.numel(),), (1,))
    half = len(flat) // 2
    for start in range(0, half, TURN_CHUNK):
        end = min(start + TURN_CHUNK, half)
        front, back = flat[start:end], flat[len(flat) - end : len(flat) - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)
    return matrix


@dataclass(frozen=True)
class FixedParams:
    """Params that are known before the first column is rounded.

    Attributes:
        scale: (n, O).
        zero: (n, O).
        step: (I,) which pair each column uses.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    step: list[int]

    def __call__(self, k, remaining):
        """Scale and zero of column k."""
        return self.scale[self.step[k]], self.zero[self.step[k]]


def quantize_columns(Wt, U, grid, params, *, column_block=128):
    """Rounds columns in the order given, compensating each one's error.

    Args:
        Wt: (I, O) target weights, one input column a row.
        U: (I, I) upper triangular factor of the damped Hessian in the same order.
        grid: Gives encode and decode.
        params: FixedParams, or a callable (k, remaining) -> (scale (O,), zero (O,)) of column k. `remaining(width)`
            gives the weights (width, O) of the columns from k on as GPTQ has compensated them, for grids that are
            fitted on the way.
        column_block: Columns handled between two large matrix products.

    Returns:
        codes (I, O) as floats, Q (I, O), and the loss tr(D H D^T) of each output (O,).
    """
    I, O = Wt.shape
    diagonal = U.diagonal()
    codes, Q, D = torch.empty_like(Wt), torch.empty_like(Wt), torch.empty_like(Wt)
    loss = torch.zeros(O, device=Wt.device, dtype=Wt.dtype)
    fast = isinstance(params, FixedParams) and compiled(Wt)
    for start in range(0, I, column_block):
        end = min(start + column_block, I)
        M = U[:end, start:end] / diagonal[start:end]
        target = Wt[start:end].addmm(M[:start].T, D[:start], alpha=-1)
        M = M[start:]
        if fast:
            step, block = params.step[start:end], slice(start, end)
            numbers = params.scale, params.zero, step, grid.arithmetic
            codes[block], Q[block], lost = round_block(
                target, Wt[block], M.contiguous(), diagonal[block].contiguous(), *numbers
            )
            torch.sub(Q[block], Wt[block], out=D[block])
            loss += lost
            continue
        for k in range(start, end):
            t = target[k - start]
            scale, zero = params(k, lambda width, k=k: remaining_columns(Wt, U, D, k, width))
            codes[k] = grid.encode(t, scale, zero)
            Q[k] = grid.decode(codes[k], scale, zero)
            torch.sub(Q[k], Wt[k], out=D[k])
            error = (Q[k] - t).mul_(diagonal[k])
            loss.addcmul_(error, error)
            target[k - start + 1 :].addr_(M[k - start, k - start + 1 :], D[k], alpha=-1)
    return codes, Q, loss


def remaining_columns(Wt, U, D, k, width):
    """Columns k..k+width that minimise the loss given the codes before k: what the paper's update leaves there."""
    end = min(k + width, Wt.shape[0])
    lower = (U[k:end, k:end] / U.diagonal()[k:end]).T
    rhs = torch.mm((U[:k, k:end] / U.diagonal()[k:end]).T, D[:k]).neg_()
    return torch.linalg.solve_triangular(lower, rhs, upper=False, unitriangular=True).add_(Wt[k:end])

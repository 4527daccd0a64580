"""The column loops for codebooks: GPTQ, and coordinate descent, by vectors of columns instead of single ones.

With H = U U^T as in columns.py, the loss of the columns v of a vector, those before it known, is

    || d_v U_vv + sum_{j<v} d_j U_jv ||^2 = || (q_v - x) U_vv ||^2,    x = w_v - sum_{j<v} d_j U_jv U_vv^-1,

so the vector of the codebook is chosen that is nearest to x in the metric U_vv U_vv^T. In coordinate descent the metric
is the Hessian's own block H_vv, and x = q_v - R_v H_vv^-1 with the gradient R.

Legend: O outputs, I inputs, m columns of a vector; matrices are transposed, (I, O).
"""

import torch

from ptq.grids.blocks.levels import nonzero
from ptq.quantizers.columns import remaining_columns
from ptq.quantizers.nearest import nearest_vectors


def quantize_vectors(Wt, U, grid, params, *, column_block=128):
    """quantize_columns for a grid whose vectors span columns: same arguments, same result."""
    (I, O), m = Wt.shape, grid.vector
    codes, Q, D = torch.empty_like(Wt), torch.empty_like(Wt), torch.empty_like(Wt)
    loss = torch.zeros(O, device=Wt.device, dtype=Wt.dtype)
    width = max(m, column_block // m * m)
    for start in range(0, I, width):
        end = min(start + width, I)
        known = U[:start, start:end].T @ D[:start]
        for k in range(start, end, m):
            v, own = slice(k, k + m), known[k - start : k - start + m]
            factor = U[v, v]
            x = Wt[v] - torch.linalg.solve_triangular(factor.T, own, upper=False)
            scale, zero = params(k, lambda width, k=k: remaining_columns(Wt, U, D, k, width))
            codes[v] = nearest_vectors(grid.book, factor @ factor.T, x, nonzero(scale))
            Q[v] = grid.decode(codes[v], scale, zero)
            torch.sub(Q[v], Wt[v], out=D[v])
            loss += own.addmm(factor.T, D[v]).square_().sum(0)
            known[k - start + m :].addmm_(U[v, k + m : end].T, D[v])
    return codes, Q, loss


def sweep_vectors(grid, scale, zero, inner, target, codes, D, gradient, step, order):
    """Coordinate descent over a span's vectors, in place in codes and D.

    Args:
        grid: A grid of vectors.
        scale: (n, O).
        zero: (n, O).
        inner: (c, c) the Hessian's part.
        target: (c, O).
        codes: (c, O).
        D: (c, O) values minus target.
        gradient: (c, O) D H on these columns, before the pass; used up.
        step: c indices into scale and zero.
        order: (c / m,) in which vectors are visited.

    Returns:
        (O,) what the loss went down by.
    """
    m, gained = grid.vector, torch.zeros_like(gradient[0])
    for v in (slice(m * k, m * k + m) for k in order.tolist()):
        A, s = inner[v, v], step[v.start]
        x = D[v] + target[v] - torch.linalg.solve(A, gradient[v])
        codes[v] = nearest_vectors(grid.book, A, x, nonzero(scale[s]), codes[v])
        change = grid.decode(codes[v], scale[s], zero[s]) - target[v] - D[v]
        gained -= (change * (2 * gradient[v] + A @ change)).sum(0)
        D[v] += change
        gradient.addmm_(inner[:, v], change)
    return gained

"""GPTQ of one stage: target, grid, columns, refinement.

W is stacked from all linears that read the same input, so their Hessian is factored once and their columns are visited
together. The steps and where they come from are in columns.py (GPTQ itself) and refine.py.

Legend: O outputs, I inputs, G groups.
"""

from dataclasses import dataclass

import torch

from ptq.grids.affine import AffineGrid
from ptq.qtensor import QuantizedTensor
from ptq.quantizers.columns import damped_factor, quantize_columns
from ptq.quantizers.refine import refine, spread
from ptq.quantizers.rtn import per_group


@dataclass(frozen=True)
class Solution:
    """A solved stage. Losses are tr(D H D^T) of each output (O,), H damped, D against the corrected target."""

    quantized: QuantizedTensor
    loss: torch.Tensor
    loss_gptq: torch.Tensor
    loss_rtn: torch.Tensor
    energy: torch.Tensor
    dead: float
    damp_percent: float


def gptq(W, H, spec, *, G=None, seed=0) -> Solution:
    """Quantizes the stacked linears of one stage.

    Args:
        W: (O, I) fp32 weights.
        H: (I, I) undamped 2/n X^T X; consumed.
        spec: A QuantSpec.
        G: (I, I) 2/n X_full^T X for the target correction, or None; consumed.
        seed: Seeds the order of refinement sweeps.

    Raises:
        InputError: H cannot be made positive definite.
    """
    I = W.shape[1]
    grid, group_size = AffineGrid(spec.bits, spec.sym), spec.columns_per_group(I)
    diagonal = H.diagonal()
    dead = float((diagonal == 0).float().mean())
    natural = layout = order = torch.arange(I, device=W.device)
    if spec.column_order == "activation":
        order = diagonal.argsort(descending=True, stable=True)
    if spec.desc_act:  # groups are runs of the activation order: lay everything out in it
        layout, order = order, natural
        W, H, G = W[:, layout], H[layout][:, layout], None if G is None else G[layout][:, layout]

    mismatch = None if G is None else W @ G.sub_(H)
    L, damping = damped_factor(H, order, spec.damp_percent)
    target = W if G is None else W + target_shift(mismatch, L, order).mul_(spec.correction)
    static = order is not natural
    loss_rtn, energy = _baseline(W, target, H, grid, group_size)
    codes, scale, zero, loss_gptq = _round(target, H, L.flip(0, 1), order, grid, group_size, static, spec.column_block)
    del L
    Wt, scale, zero = target.T.contiguous(), scale.T.contiguous(), zero.T.contiguous()
    generator = torch.Generator().manual_seed(seed)
    refine(
        Wt, H, codes, scale, zero, grid, group_size,
        rounds=spec.refine_rounds, generator=generator, column_block=spec.column_block,
    )  # fmt: skip
    Q = grid.decode(codes, spread(scale, group_size, I), spread(zero, group_size, I))
    loss = _loss(Q - Wt, H) if spec.refine_rounds else loss_gptq

    stored, g_idx = torch.empty_like(codes, dtype=torch.uint8), torch.empty_like(natural, dtype=torch.int32)
    stored[layout] = codes.to(torch.uint8)
    g_idx[layout] = (natural // group_size).int()
    quantized = QuantizedTensor(
        stored.T.contiguous(), scale.T.contiguous(), zero.T.contiguous(), g_idx, spec.bits, spec.group_size
    )
    return Solution(quantized, loss, loss_gptq, loss_rtn, energy, dead, damping)


def target_shift(mismatch, L, order):
    """What to add to W so that quantized-stream inputs give the full-precision stream's outputs, by least squares.

    W* = W + W (G - H) (H + damping)^-1 minimises ||X_full W^T - X V^T||^2 + damping ||V - W||^2 over V (the same
    correction as QEP, arXiv 2504.09629, and the first step of Qronos, arXiv 2505.11695).

    Args:
        mismatch: (O, I) W (G - H), H undamped.
        L: From damped_factor.
        order: The order L is in.

    Returns:
        (O, I).
    """
    backwards = order.flip(0)
    shift = torch.empty_like(mismatch)
    shift[:, backwards] = torch.cholesky_solve(mismatch[:, backwards].T, L).T
    return shift


def _round(target, H, U, order, grid, group_size, static, column_block):
    """GPTQ proper. Codes come back (I, O) in the layout's order, scale and zero (O, G)."""
    I = target.shape[1]
    if static:
        scale, zero = per_group(target, group_size, grid.fit, H.diagonal())
    else:
        G = -(-I // group_size)
        scale, zero = target.new_empty(target.shape[0], G), target.new_empty(target.shape[0], G)
    group_of = (order // group_size).tolist()
    scale_rows, zero_rows = scale.T.contiguous(), zero.T.contiguous()
    importance = U.diagonal() ** 2

    def params(k, remaining):
        g = group_of[k]
        if not static and k % group_size == 0:
            rows = remaining(group_size).T
            scale_rows[g], zero_rows[g] = grid.fit(rows, importance[k : k + rows.shape[1]][None])
        return scale_rows[g], zero_rows[g]

    codes, _, loss = quantize_columns(target.T[order], U, grid, params, column_block=column_block)
    laid_out = torch.empty_like(codes)
    laid_out[order] = codes
    return laid_out, scale_rows.T, zero_rows.T, loss


def _baseline(W, target, H, grid, group_size):
    """Losses of plain round-to-nearest on the same grid, and of writing nothing at all, per output."""
    scale, zero = (p.T for p in per_group(W, group_size, grid.fit_minmax))
    Wt = W.T
    scale, zero = spread(scale, group_size, len(Wt)), spread(zero, group_size, len(Wt))
    Q = grid.decode(grid.encode(Wt, scale, zero), scale, zero)
    return _loss(Q - target.T, H), _loss(target.T, H)


def _loss(D, H):
    """(I, O) to (O,): tr(D H D^T) row by row."""
    return (D * (H @ D)).sum(0)

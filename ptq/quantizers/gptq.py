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

CHUNK = 1 << 22  # weights worked on at once: rows are independent, and a dozen matrices of this size are alive


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


def gptq(weights, H, spec, *, G=None, seed=0) -> Solution:
    """Quantizes the linears of one stage.

    Args:
        weights: (O, I) matrix, or several to be stacked.
        H: (I, I) fp32, undamped 2/n X^T X; consumed.
        spec: A QuantSpec.
        G: (I, I) fp32 2/n X_full^T X for the target correction, or None; consumed.
        seed: Seeds the order of refinement sweeps.

    Returns:
        The solution of the stacked matrix.

    Raises:
        InputError: H cannot be made positive definite.
    """
    weights = [weights] if isinstance(weights, torch.Tensor) else weights
    stage = _Stage(H, G, spec, weights[0].shape[1], seed)
    parts = [stage.solve(W) for W in _row_chunks(weights, CHUNK)]
    codes, scale, zero, *losses = (torch.cat(part) for part in zip(*parts, strict=True))
    quantized = QuantizedTensor(codes, scale, zero, stage.g_idx, spec.bits, spec.group_size)
    for consumed in (H, G):
        if consumed is not None:
            consumed.set_()  # the caller still names it; its memory is wanted
    return Solution(quantized, *losses, stage.dead, stage.damp_percent)


class _Stage:
    """What all rows of a stage share: the damped Hessian, its factor, the order of columns."""

    def __init__(self, H, G, spec, I, seed):
        self.spec, self.seed = spec, seed
        self.grid, self.group_size = AffineGrid(spec.bits, spec.sym), spec.columns_per_group(I)
        diagonal = H.diagonal()
        self.dead = float((diagonal == 0).float().mean())
        natural = torch.arange(I, device=H.device)
        self.layout = self.order = natural
        if spec.column_order == "activation":
            self.order = diagonal.argsort(descending=True, stable=True)
        if spec.desc_act:  # groups are runs of the activation order: lay everything out in it
            self.layout, self.order = self.order, natural
            H, G = H[self.layout][:, self.layout], None if G is None else G[self.layout][:, self.layout]
        self.static = self.order is not natural
        self.g_idx = torch.empty_like(natural, dtype=torch.int32)
        self.g_idx[self.layout] = (natural // self.group_size).int()
        self.mismatch = None if G is None else G.sub_(H)
        self.U, self.damp_percent = damped_factor(H, self.order, spec.damp_percent)
        self.H = H

    def solve(self, W):
        """codes, scale, zero and the losses of some rows W (O, I); rows first."""
        W = W[:, self.layout]
        target = W
        if self.mismatch is not None:
            target = W + target_shift(W @ self.mismatch, self.U, self.order).mul_(self.spec.correction)
        loss_rtn, energy = self._baseline(W, target)
        Wt = target.T.contiguous()
        codes, scale, zero, loss_gptq = self._round(target, Wt)
        del W, target
        options = {"generator": torch.Generator().manual_seed(self.seed), "column_block": self.spec.column_block}
        rounds = self.spec.refine_rounds
        refine(Wt, self.H, codes, scale, zero, self.grid, self.group_size, rounds=rounds, **options)
        loss = loss_gptq
        if rounds:
            Q = self.grid.decode(codes, *(spread(p, self.group_size, len(Wt)) for p in (scale, zero)))
            loss = _loss(Q.sub_(Wt), self.H)
        stored = torch.empty_like(codes, dtype=torch.uint8)
        stored[self.layout] = codes.to(torch.uint8)
        return stored.T.contiguous(), scale.T.contiguous(), zero.T.contiguous(), loss, loss_gptq, loss_rtn, energy

    def _round(self, target, Wt):
        """GPTQ proper: codes (I, O), scale and zero (G, O), loss (O,)."""
        I, O = Wt.shape
        G = -(-I // self.group_size)
        if self.static:
            fitted = per_group(target, self.group_size, self.grid.fit, self.H.diagonal())
            scale, zero = (parameter.T.contiguous() for parameter in fitted)
        else:
            scale, zero = target.new_empty(G, O), target.new_empty(G, O)
        group_of, importance = (self.order // self.group_size).tolist(), self.U.diagonal() ** 2

        def parameters(k, remaining):
            g = group_of[k]
            if not self.static and k % self.group_size == 0:
                rows = remaining(self.group_size).T
                scale[g], zero[g] = self.grid.fit(rows, importance[k : k + rows.shape[1]][None])
            return scale[g], zero[g]

        ordered = Wt[self.order] if self.static else Wt
        visited, _, loss = quantize_columns(ordered, self.U, self.grid, parameters, column_block=self.spec.column_block)
        codes = torch.empty_like(visited)
        codes[self.order] = visited
        return codes, scale, zero, loss

    def _baseline(self, W, target):
        """Losses of plain round-to-nearest on the same grid, and of writing nothing at all, per output."""
        scale, zero = (p.T for p in per_group(W, self.group_size, self.grid.fit_minmax))
        scale, zero = (spread(p, self.group_size, W.shape[1]) for p in (scale, zero))
        Q = self.grid.decode(self.grid.encode(W.T, scale, zero), scale, zero)
        return _loss(Q.sub_(target.T), self.H), _loss(target.T, self.H)


def _row_chunks(weights, limit):
    """fp32 rows of the stacked matrices, as many at a time as `limit` weights allow."""
    held, count, rows = [], 0, max(1, limit // weights[0].shape[1])
    for W in weights:
        for part in W.split(rows):
            if count + len(part) > rows:
                yield torch.cat(held)
                held, count = [], 0
            held.append(part.float())
            count += len(part)
    yield torch.cat(held)


def target_shift(mismatch, U, order):
    """What to add to W so that quantized-stream inputs give the full-precision stream's outputs, by least squares.

    W* = W + W (G - H) (H + damping)^-1 minimises ||X_full W^T - X V^T||^2 + damping ||V - W||^2 over V (the same
    correction as QEP, arXiv 2504.09629, and the first step of Qronos, arXiv 2505.11695).

    Args:
        mismatch: (O, I) W (G - H), H undamped.
        U: (I, I) upper triangular, from damped_factor.
        order: The order U is in.

    Returns:
        (O, I).
    """
    half = torch.linalg.solve_triangular(U, mismatch[:, order].T, upper=True)
    shift = torch.empty_like(mismatch)
    shift[:, order] = torch.linalg.solve_triangular(U.T, half, upper=False).T
    return shift


def _loss(D, H):
    """(I, O) to (O,): tr(D H D^T) row by row."""
    return (D * (H @ D)).sum(0)

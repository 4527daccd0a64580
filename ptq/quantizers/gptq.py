"""GPTQ of one stage: target, grid, columns, refinement.

W is stacked from all linears that read the same input, so their Hessian is factored once and their columns are visited
together. The steps and where they come from are in columns.py (GPTQ itself) and refine.py.

Legend: O outputs, I inputs, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import repeat

import torch

from calibration.store import mapped, write
from ptq.clock import Clock
from ptq.grids.affine import AffineGrid
from ptq.qtensor import BlockTensor, QuantizedTensor
from ptq.quantizers.columns import FixedParams, damped_factor, quantize_columns
from ptq.quantizers.refine import refine
from ptq.quantizers.spans import cut_spans, fit_spans
from ptq.quantizers.vectors import quantize_vectors

CHUNK = 1 << 20  # weights worked on at once: rows are independent, and a dozen matrices of this size are alive
ROWS = 32  # rows are cut at multiples of this: sums run over whole vectors then, and the bits do not depend on the cuts
LOSS_TILE = 512  # columns at once


@dataclass(frozen=True)
class Solution:
    """A solved stage. Losses are tr(D H D^T) of each output (O,), H damped, D against the corrected target."""

    quantized: QuantizedTensor | BlockTensor
    loss: torch.Tensor
    loss_gptq: torch.Tensor
    loss_rtn: torch.Tensor
    energy: torch.Tensor
    dead: float
    damp_percent: float

    def gathered(self, gather: Callable[..., torch.Tensor]) -> "Solution":
        """All outputs, where each rank has solved some; `gather(tensor, dim)` as Ranks has it."""
        losses = {name: gather(getattr(self, name)) for name in ("loss", "loss_gptq", "loss_rtn", "energy")}
        return replace(self, quantized=self.quantized.gathered(gather), **losses)


def gptq(weights, H, spec, *, grid=None, G=None, WG=None, seed=0, rows=None, spill=None, clock=None) -> Solution:
    """Quantizes the linears of one stage.

    Args:
        weights: (O, I) matrix, or several to be stacked.
        H: (I, I) fp32, undamped 2/n X^T X; consumed.
        spec: A QuantSpec.
        grid: A BlockGrid; None for the uniform groups that spec names.
        G: (I, I) fp32 2/n X_full^T X for the target correction, or None; consumed.
        WG: (O, I) fp32 W (G - H) of the stacked matrix, H undamped, in place of G; consumed.
        seed: Seeds the order of refinement sweeps.
        rows: A slice of the stacked matrix, to solve no more than that; None for all.
        spill: File for G - H while H is factored; None keeps it in memory.
        clock: Gets the seconds of factor, target, baseline, scales, columns and refine.

    Returns:
        The solution of the stacked matrix, or of those rows.

    Raises:
        InputError: H cannot be made positive definite.
    """
    weights = [weights] if isinstance(weights, torch.Tensor) else weights
    stage = _Stage(H, G, spec, grid, weights[0].shape[1], seed, spill, clock or Clock())
    rows = rows or slice(0, sum(map(len, weights)))
    mismatches = repeat(None) if WG is None else _row_chunks([WG], rows, CHUNK)
    targets = map(stage.target, _row_chunks(weights, rows, CHUNK), mismatches)
    if (G is not None or WG is not None) and len(H) > rows.stop - rows.start:
        targets = list(targets)  # takes less memory than G, which has done its work then
        stage.mismatch = None
        _let_go(G, WG)
    tensors, losses = zip(*(stage.solve(*target) for target in targets), strict=True)
    quantized, losses = tensors[0].stack(tensors), map(torch.cat, zip(*losses, strict=True))
    _let_go(H, G, WG)
    return Solution(quantized, *losses, stage.dead, stage.damp_percent)


def _let_go(*consumed):
    """Frees tensors that the caller still names."""
    for tensor in consumed:
        if tensor is not None:
            tensor.set_()


class _Stage:
    """What all rows of a stage share: the damped Hessian and its factor, the order of columns, the spans.

    A matrix's own columns are "natural"; spans are runs of the layout, which is natural or, under desc_act, the
    activation order. Everything here lies in visiting order: `order` leads to it from the layout.
    """

    def __init__(self, H, G, spec, grid, I, seed, spill, clock):
        self.spec, self.seed, self.clock = spec, seed, clock
        self.grid, self.span = grid or AffineGrid(spec.bits, spec.sym), grid.span if grid else spec.columns_per_group(I)
        self.dead = float((H.diagonal() == 0).float().mean())
        natural = torch.arange(I, device=H.device)
        visited = natural
        if spec.column_order == "activation":
            visited = _by_activation(H.diagonal(), self.grid.vector)
        self.layout, self.order = (visited, natural) if spec.desc_act else (natural, visited)
        self.static = self.order is not natural
        self.spans = cut_spans(self.order, self.span, self.grid.columns_per_step(self.span))
        self.g_idx = torch.empty_like(natural, dtype=torch.int32)
        self.g_idx[self.layout] = (natural // self.span).int()
        H = _reorder(H, visited)
        self.mismatch = None if G is None else _reorder(G, visited).sub_(H)
        if G is not None and spill is not None:
            write(self.mismatch, spill)
            self.mismatch = mapped(spill, G.shape, G.dtype)
            G.set_()
        with clock.phase("factor"):
            self.U, self.damp_percent = damped_factor(H, spec.damp_percent)
        self.H = H

    def target(self, W, mismatch=None):
        """What some rows W (O, I) aim at, (I, O), and the losses of plain rounding and of zeros against it.

        `mismatch` is W (G - H) of those rows in W's order, where that was summed in place of G.
        """
        W = W[:, self.layout]
        target = Wt = W[:, self.order].T.contiguous()
        if mismatch is not None or self.mismatch is not None:
            with self.clock.phase("target"):
                mismatch = Wt.T @ self.mismatch if mismatch is None else mismatch[:, self.layout[self.order]]
                shift = target_shift(mismatch, self.U).mul_(self.spec.correction)
                target = torch.add(Wt, shift.T, out=torch.empty_like(Wt))
                del shift
        with self.clock.phase("baseline"):
            plain = fit_spans(W, self.span, self.grid.fit_minmax)
            return target, *self._baseline(Wt, plain, target)

    def solve(self, Wt, loss_rtn, energy):
        """The rows of a target, quantized, and losses: refined, before refinement, of plain rounding, of zeros."""
        codes, params, loss_gptq = self._round(Wt)
        loss = loss_gptq
        if self.spec.refine_rounds:
            with self.clock.phase("refine"):
                loss = loss_gptq - refine(
                    Wt, self.H, codes, self.spans, params, self.grid,
                    rounds=self.spec.refine_rounds, generator=torch.Generator().manual_seed(self.seed),
                )  # fmt: skip
        stored = torch.empty_like(codes, dtype=torch.uint8)
        stored[self.layout[self.order]] = codes.to(torch.uint8)
        return self._tensor(stored.T.contiguous(), params), (loss, loss_gptq, loss_rtn, energy)

    def _tensor(self, codes, params):
        if not isinstance(self.grid, AffineGrid):
            return BlockTensor(codes, tuple(map(torch.stack, zip(*params, strict=True))), self.grid)
        scale, zero = (torch.stack(p, 1) for p in zip(*params, strict=True))
        return QuantizedTensor(codes, scale, zero, self.g_idx, self.spec.bits, self.spec.group_size)

    def _round(self, Wt):
        """GPTQ proper: codes (I, O), every span's params, loss (O,)."""
        if self.static:
            target, weight = torch.empty_like(Wt), self.H.new_empty(len(Wt))
            target[self.order], weight[self.order] = Wt, self.H.diagonal()
            with self.clock.phase("scales"):
                params = fit_spans(target.T, self.span, self.grid.fit, weight)
            given = self._fixed(params)
        else:
            params = []
            given = self._on_the_way(params)
        quantize = quantize_columns if self.grid.vector == 1 else quantize_vectors
        with self.clock.phase("columns"):
            codes, _, loss = quantize(Wt, self.U, self.grid, given, column_block=self.spec.column_block)
        return codes, params, loss

    def _fixed(self, params) -> FixedParams:
        """All spans' (scale, zero) pairs, one after the other, and which of them each visited column uses."""
        scale, zero = (torch.cat(p) for p in zip(*map(self.grid.steps, params), strict=True))
        width = self.grid.columns_per_step(self.span)
        first = self.order // self.span * (self.span // width)
        return FixedParams(scale, zero, (first + self.order % self.span // width).tolist())

    def _on_the_way(self, params):
        """Fits every span when its first column is reached; spans are visited in order, columns as they lie."""
        importance, width = self.U.diagonal() ** 2, self.grid.columns_per_step(self.span)

        def given(k, remaining):
            if k % self.span == 0:
                rows = remaining(self.span).T
                with self.clock.phase("scales"):
                    params.append(self.grid.fit(rows, importance[k : k + rows.shape[1]][None]))
            scale, zero = self.grid.steps(params[-1])
            return scale[k % self.span // width], zero[k % self.span // width]

        return given

    def _baseline(self, Wt, plain, target):
        """Losses of plain round-to-nearest on the same grid, and of writing nothing at all, per output."""
        D = torch.empty_like(Wt)
        for span, params in zip(self.spans, plain, strict=True):
            scale, zero = (p[span.step] for p in self.grid.steps(params))
            D[span.columns] = self.grid.decode(self.grid.encode(Wt[span.columns], scale, zero), scale, zero)
        return _loss(D.sub_(target), self.H), _loss(target, self.H)


def _by_activation(diagonal, vector):
    """(I,) columns with the largest diagonal first; a vector's stay side by side and go by their largest."""
    if vector == 1:
        return diagonal.argsort(descending=True, stable=True)
    first = diagonal.view(-1, vector).amax(1).argsort(descending=True, stable=True) * vector
    return (first[:, None] + torch.arange(vector, device=first.device)).flatten()


def _reorder(H, order):
    """H[order][:, order]; the given one is used up."""
    if bool((order == torch.arange(len(order), device=order.device)).all()):
        return H
    rows = H.index_select(0, order)
    return torch.index_select(rows, 1, order, out=H)


def _row_chunks(weights, rows, limit):
    """fp32 rows of the stacked matrices, a multiple of ROWS that `limit` weights allow at a time."""
    step = max(1, limit // weights[0].shape[1] // ROWS) * ROWS
    for first in range(rows.start, rows.stop, step):
        last, chunk, passed = min(first + step, rows.stop), [], 0
        for W in weights:
            chunk.append(W[max(0, first - passed) : max(0, last - passed)].float())
            passed += len(W)
        yield torch.cat(chunk)


def target_shift(mismatch, U):
    """What to add to W so that quantized-stream inputs give the full-precision stream's outputs, by least squares.

    W* = W + W (G - H) (H + damping)^-1 minimises ||X_full W^T - X V^T||^2 + damping ||V - W||^2 over V (the same
    correction as QEP, arXiv 2504.09629, and the first step of Qronos, arXiv 2505.11695).

    Args:
        mismatch: (O, I) W (G - H), H undamped.
        U: (I, I) upper triangular, from damped_factor.

    Returns:
        (O, I).
    """
    half = torch.linalg.solve_triangular(U, mismatch.T, upper=True)
    return torch.linalg.solve_triangular(U.T, half, upper=False).T


def _loss(D, H):
    """(I, O) to (O,): tr(D H D^T) row by row. H is symmetric: what lies above its diagonal counts twice."""
    loss = D.new_zeros(D.shape[1])
    for start in range(0, len(D), LOSS_TILE):
        tile, right = slice(start, start + LOSS_TILE), slice(start + LOSS_TILE, None)
        bent = (H[tile, tile] @ D[tile]).addmm_(H[tile, right], D[right], alpha=2)
        loss += bent.mul_(D[tile]).sum(0)
    return loss

"""GPTQ of one stage: target, grid, columns, refinement.

W is stacked from all linears that read the same input, so their Hessian is factored once and their columns are visited
together. The steps and where they come from are in columns.py (GPTQ itself) and refine.py.

Legend: O outputs, I inputs, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, repeat

import torch

from calibration.products import factor
from calibration.store import RowsOnDisk, SquareOnDisk, mapped, write
from ptq.clock import Clock
from ptq.grids.affine import AffineGrid
from ptq.qtensor import BlockTensor, QuantizedTensor
from ptq.quantizers.chunks import chunk_size, over_chunks, row_chunks, row_cuts, threads_of
from ptq.quantizers.columns import FixedParams, damped_factor, permuted, quantize_columns
from ptq.quantizers.coupled import coupled_loss, errors, normalised, quantize_coupled, refine_coupled
from ptq.quantizers.refine import refine
from ptq.quantizers.spans import cut_spans, fit_spans
from ptq.quantizers.vectors import quantize_vectors

LOSS_TILE = 512  # columns at once
LARGE = 64 << 20  # bytes of a matrix (I, I); smaller ones stay in memory where that is short


def large(in_features: int) -> bool:
    """Whether matrices of a stage go to disk for a while where memory is short."""
    return 4 * in_features**2 >= LARGE


@dataclass(frozen=True)
class Solution:
    """A solved stage. Losses are tr(D H D^T) of each output (O,), H damped, D against the corrected target.

    Where outputs were solved together, `coupled` holds their parts of tr(H_O D H D^T), (O, 3): after refinement,
    before, and of zeros.
    """

    quantized: QuantizedTensor | BlockTensor
    loss: torch.Tensor
    loss_gptq: torch.Tensor
    loss_rtn: torch.Tensor
    energy: torch.Tensor
    dead: float
    damp_percent: float
    coupled: torch.Tensor | None = None

    def gathered(self, gather: Callable[..., torch.Tensor]) -> "Solution":
        """All outputs, where each rank has solved some; `gather(tensor, dim)` as Ranks has it."""
        names = ["loss", "loss_gptq", "loss_rtn", "energy"] + ["coupled"] * (self.coupled is not None)
        losses = {name: gather(getattr(self, name)) for name in names}
        return replace(self, quantized=self.quantized.gathered(gather), **losses)


def gptq(
    weights, H, spec, *, grid=None, G=None, WG=None, outputs=None, seed=0, rows=None, spill=None, clock=None
) -> Solution:
    """Quantizes the linears of one stage.

    Args:
        weights: (O, I) matrix, or several to be stacked.
        H: (I, I) fp32, undamped 2/n X^T X; consumed.
        spec: A QuantSpec.
        grid: A BlockGrid; None for the uniform groups that spec names.
        G: (I, I) fp32 2/n X_full^T X for the target correction, or None; consumed.
        WG: (O, I) fp32 W (G - H) of the stacked matrix, H undamped, in place of G; consumed.
        outputs: H_O (rows, rows) of one run of the stacked matrix's rows after the other, all of them: rows of a run
            are solved together (coupled.py). None where rows are independent.
        seed: Seeds the order of refinement sweeps.
        rows: A slice of the stacked matrix, to solve no more than that, whole runs where there are; None for all.
        spill: Where memory is short, folder for large H and WG, and G - H while H is factored; fewer rows are solved
            at once then. None keeps all in memory.
        clock: Gets the seconds of factor, target, baseline, scales, columns and refine.

    Returns:
        The solution of the stacked matrix, or of those rows.

    Raises:
        InputError: H cannot be made positive definite.
    """
    weights, clock = [weights] if isinstance(weights, torch.Tensor) else weights, clock or Clock()
    I, small = weights[0].shape[1], spill is not None
    spill = spill if large(I) else None
    if WG is not None and spill is not None:
        WG = RowsOnDisk(WG, spill / "WG.bin")
    stage = _Stage(H, G, spec, grid, I, seed, spill, clock)
    rows, threads = rows or slice(0, sum(map(len, weights))), threads_of(H.device)
    if outputs is None:
        cuts, couplings = row_cuts(rows, I, chunk_size(threads, small=small)), repeat(None)
    else:
        cuts, couplings = zip(*_runs(outputs, rows), strict=True)
    mismatches = repeat(None) if WG is None else (WG[cut] for cut in cuts)
    chunks = zip(row_chunks(weights, cuts), mismatches, couplings, strict=False)
    if G is not None and len(stage.H) > rows.stop - rows.start:
        targets = over_chunks(stage.target, chunks, clock, threads)  # takes less memory than G, which has done its work
        stage.mismatch = None
        _let_go(G)
        solved = over_chunks(stage.solve, targets, clock, threads)
    else:
        solved = over_chunks(stage.target_and_solve, chunks, clock, threads)
    facts = stage.dead, stage.damp_percent
    del stage
    _let_go(H, G, WG)
    tensors, losses = zip(*solved, strict=True)
    quantized, losses = tensors[0].stack(tensors), list(map(torch.cat, zip(*losses, strict=True)))
    return Solution(quantized, *losses[:4], *facts, *losses[4:])


def _let_go(*consumed):
    """Frees tensors that the caller still names."""
    for tensor in consumed:
        if isinstance(tensor, torch.Tensor):
            tensor.set_()


class _Stage:
    """What all rows of a stage share: the damped Hessian and its factor, the order of columns, the spans.

    Everything lies in the layout, in which spans are runs of columns: the matrix's own order or, under desc_act, the
    activation order. `visited` leads from it to the order in which GPTQ rounds, where that is another one.
    """

    def __init__(self, H, G, spec, grid, I, seed, spill, clock):
        self.spec, self.seed = spec, seed
        self.grid, self.span = grid or AffineGrid(spec.bits, spec.sym), grid.span if grid else spec.columns_per_group(I)
        self.dead = float((H.diagonal() == 0).float().mean())
        self.layout, self.visited = None, None
        if spec.column_order == "activation":
            order = _by_activation(H.diagonal(), self.grid.vector)
            if spec.desc_act:
                self.layout = order
                for moments in (H,) if G is None else (H, G):
                    moments.copy_(permuted(moments, order))
            else:
                self.visited = order
        self.spans = cut_spans(I, self.span, self.grid.columns_per_step(self.span))
        self.g_idx = torch.arange(I, dtype=torch.int32, device=H.device) // self.span
        if self.layout is not None:
            self.g_idx[self.layout] = self.g_idx.clone()
        self.mismatch = None if G is None else G.sub_(H)
        if spill is not None:
            H = SquareOnDisk(H, spill / "H.bin")
            if G is not None:
                write(self.mismatch, spill / "mismatch.bin")
                self.mismatch = mapped(spill / "mismatch.bin", G.shape, G.dtype)
                G.set_()
        with clock.phase("factor"):
            self.U, self.damp_percent = damped_factor(H, spec.damp_percent, self.visited)
        self.H = H

    def target_and_solve(self, clock, Wt, mismatch, HO):
        """Both, one after the other."""
        return self.solve(clock, *self.target(clock, Wt, mismatch, HO))

    def target(self, clock, Wt, mismatch, HO):
        """What some rows Wt (I, O) aim at, in their place; H_O; the losses of plain rounding and of zeros.

        `mismatch` is W (G - H) of those rows in W's order, where that was summed in place of G.
        """
        if self.layout is not None:
            Wt, mismatch = Wt[self.layout], None if mismatch is None else mismatch[:, self.layout]
        with clock.phase("baseline"):
            plain = self._plain(Wt)
        if mismatch is not None or self.mismatch is not None:
            with clock.phase("target"):
                mismatch = Wt.T @ self.mismatch if mismatch is None else mismatch
                shift = self._as_laid_out(target_shift(_columns(mismatch, self.visited), self.U).T)
                Wt.add_(shift.mul_(self.spec.correction))
                del shift
        with clock.phase("baseline"):
            return Wt, HO, _loss(plain.sub_(Wt), self.H), _loss(Wt, self.H)

    def solve(self, clock, Wt, HO, loss_rtn, energy):
        """The rows of a target, quantized, and losses: refined, before refinement, of plain rounding, of zeros."""
        if HO is not None:
            return self._solve_coupled(clock, Wt, normalised(HO.cpu()), loss_rtn, energy)
        codes, params, loss_gptq = self._round(clock, Wt)
        loss = loss_gptq
        if self.spec.refine_rounds:
            with clock.phase("refine"):
                loss = loss_gptq - refine(
                    Wt, self.H, codes, self.spans, params, self.grid,
                    rounds=self.spec.refine_rounds, generator=torch.Generator().manual_seed(self.seed),
                )  # fmt: skip
        return self._tensor(codes, params), (loss, loss_gptq, loss_rtn, energy)

    def _solve_coupled(self, clock, Wt, HO, loss_rtn, energy):
        """The same where rows weigh on each other; the losses as they are for rows by themselves, then coupled."""
        (H, U), device, Wt = self._on_cpu, Wt.device, Wt.cpu()
        with clock.phase("scales"):
            params = fit_spans(Wt.T, self.span, self.grid.fit, H.diagonal())
        with clock.phase("columns"):
            given, visited = self._fixed(params), torch.arange(len(Wt)) if self.visited is None else self.visited.cpu()
            codes = self._as_laid_out(
                quantize_coupled(Wt, visited, U, HO, self.grid, given, column_block=self.spec.column_block)
            )
        lost = [self._lost(D, HO) for D in (Wt, errors(Wt, codes, self.spans, params, self.grid))]
        with clock.phase("refine"):
            refine_coupled(
                Wt, H, HO, codes, self.spans, params, self.grid,
                rounds=self.spec.refine_rounds, generator=torch.Generator().manual_seed(self.seed),
            )  # fmt: skip
        lost.append(self._lost(errors(Wt, codes, self.spans, params, self.grid), HO))
        (_, zeros), (loss_gptq, rounded), (loss, refined) = lost
        losses = loss, loss_gptq, loss_rtn, energy, torch.stack([refined, rounded, zeros], 1)
        params = [tuple(numbers.to(device) for numbers in of_span) for of_span in params]
        return self._tensor(codes.to(device), params), tuple(x.to(device) for x in losses)

    def _lost(self, D, HO):
        """What errors D (I, O) lose by rows themselves, and coupled."""
        H = self._on_cpu[0]
        return _loss(D, H), coupled_loss(D, H, HO)

    @cached_property
    def _on_cpu(self):
        """H and U for loops that are compiled; H where it lies, if that is a disk."""
        return (self.H if self.H.device.type == "cpu" else self.H.cpu()), self.U.cpu()

    def _as_laid_out(self, rows):
        """(I, O) in visiting order, in the layout."""
        if self.visited is None:
            return rows.contiguous()
        result = torch.empty_like(rows, memory_format=torch.contiguous_format)
        result[self.visited.to(rows.device)] = rows
        return result

    def _tensor(self, codes, params):
        """From codes (I, O) as they are laid out."""
        codes = codes.T.to(torch.uint8).contiguous()
        if self.layout is not None:
            codes[:, self.layout] = codes.clone()
        if not isinstance(self.grid, AffineGrid):
            return BlockTensor(codes, tuple(map(torch.stack, zip(*params, strict=True))), self.grid)
        scale, zero = (torch.stack(p, 1) for p in zip(*params, strict=True))
        return QuantizedTensor(codes, scale, zero, self.g_idx, self.spec.bits, self.spec.group_size)

    def _round(self, clock, Wt):
        """GPTQ proper: codes (I, O), every span's params, loss (O,)."""
        if self.visited is not None:
            with clock.phase("scales"):
                params = fit_spans(Wt.T, self.span, self.grid.fit, self.H.diagonal())
            given, Wt = self._fixed(params), Wt[self.visited]
        else:
            params = []
            given = self._on_the_way(clock, params)
        quantize = quantize_columns if self.grid.vector == 1 else quantize_vectors
        with clock.phase("columns"):
            codes, _, loss = quantize(Wt, self.U, self.grid, given, column_block=self.spec.column_block)
        return self._as_laid_out(codes), params, loss

    def _fixed(self, params) -> FixedParams:
        """All spans' (scale, zero) pairs, one after the other, and which of them each visited column uses."""
        scale, zero = (torch.cat(p) for p in zip(*map(self.grid.steps, params), strict=True))
        width = self.grid.columns_per_step(self.span)
        visited = torch.arange(len(self.H)) if self.visited is None else self.visited
        first = visited // self.span * (self.span // width)
        return FixedParams(scale, zero, (first + visited % self.span // width).tolist())

    def _on_the_way(self, clock, params):
        """Fits every span when its first column is reached; spans are visited in order, columns as they lie."""
        importance, width = self.U.diagonal() ** 2, self.grid.columns_per_step(self.span)

        def given(k, remaining):
            if k % self.span == 0:
                rows = remaining(self.span).T
                with clock.phase("scales"):
                    params.append(self.grid.fit(rows, importance[k : k + rows.shape[1]][None]))
            scale, zero = self.grid.steps(params[-1])
            return scale[k % self.span // width], zero[k % self.span // width]

        return given

    def _plain(self, Wt):
        """(I, O) of plain rounding to nearest on the same grid."""
        values = torch.empty_like(Wt)
        for span, params in zip(self.spans, fit_spans(Wt.T, self.span, self.grid.fit_minmax), strict=True):
            scale, zero = (p[span.step] for p in self.grid.steps(params))
            values[span.columns] = self.grid.decode(self.grid.encode(Wt[span.columns], scale, zero), scale, zero)
        return values


def _by_activation(diagonal, vector):
    """(I,) columns with the largest diagonal first; a vector's stay side by side and go by their largest."""
    if vector == 1:
        return diagonal.argsort(descending=True, stable=True)
    first = diagonal.view(-1, vector).amax(1).argsort(descending=True, stable=True) * vector
    return (first[:, None] + torch.arange(vector, device=first.device)).flatten()


def _runs(outputs, rows):
    """(the rows that it is about, H_O) of those within a slice."""
    for HO, stop in zip(outputs, accumulate(map(len, outputs)), strict=True):
        if rows.start <= stop - len(HO) and stop <= rows.stop:
            yield slice(stop - len(HO), stop), HO


def _columns(matrix, order):
    """The matrix's columns in another order; itself for None."""
    return matrix if order is None else matrix[:, order]


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
    loss, of_D = D.new_zeros(D.shape[1]), factor(D)
    for start in range(0, len(D), LOSS_TILE):
        tile, right = slice(start, start + LOSS_TILE), slice(start + LOSS_TILE, None)
        rows = factor(H[tile])
        bent = (rows[:, tile] @ of_D[tile]).addmm_(rows[:, right], of_D[right], alpha=2)
        loss += bent.float().mul_(D[tile]).sum(0)
    return loss

"""One stage of a block: linears that read the same input, solved together as far as they share a grid.

With several ranks each solves its own outputs and gathers the others'.
"""

from itertools import accumulate

import torch

from calibration.errors import InputError
from calibration.hessian import Hessian, few_rows
from calibration.products import bf16_products
from calibration.ranks import ALONE, Ranks
from ptq.clock import Clock
from ptq.quantizers.chunks import ROWS
from ptq.quantizers.gptq import gptq
from ptq.quantizers.rtn import rtn
from ptq.streamed import StreamedModel


class StageSolver:
    """Solves stages of the block that is loaded.

    Args:
        model: The model, streamed.
        spec: QuantSpec.
        codec: Gives the grid of each linear.
        clock: Gets the seconds by phase.
        sums: Folder for sums of H and G, and G - H for a while; None keeps them in memory.
        ranks: This process's place among those that share the work.
        bf16: Form the solver's products in bf16 (calibration/products.py).
    """

    def __init__(
        self, model: StreamedModel, spec, codec, clock: Clock,
        *, sums=None, ranks: Ranks = ALONE, bf16: bool = False,
    ):  # fmt: skip
        self.model, self.spec, self.codec, self.clock = model, spec, codec, clock
        self.sums, self.ranks, self.bf16 = sums, ranks, bf16

    def hessian(self, i: int, stage, *, cross: bool, counts=None) -> Hessian:
        """Sums for a stage of block i, to be fed with what it reads; `cross` where there are two streams."""
        inputs, weights = self.model.weight(i, stage[0]).shape[1], self._summed_with(i, stage)
        return Hessian(inputs, cross=cross, weights=weights, counts=counts, device=self.model.device, folder=self.sums)

    def solve(self, i: int, stage, H, G, salt: int, outputs=None):
        """(QuantizedTensor, report entry) of each linear of a stage of block i.

        Args:
            i: The block.
            stage: Names of linears inside the block.
            H: (I, I); consumed, as G is.
            G: What `hessian` summed besides: (I, I), (O, I) or None.
            salt: Makes the seed of refinement the stage's own.
            outputs: H_O of the stage's runs of outputs, if they are to be weighed against each other.
        """
        with self.clock.phase("solve"), bf16_products(self.bf16):
            solved, groups = {}, self._by_grid(i, stage)
            for k, (grid, names) in enumerate(groups):
                last = k == len(groups) - 1  # the solver uses up what it is given
                moments = H if last else H.clone(), self._cross_moment(i, stage, names, G, last)
                coupling = None if grid and grid.vector > 1 else self._coupling(i, stage, names, outputs)
                solved |= self._solve_together(i, names, grid, *moments, coupling, salt)
        return [solved[name] for name in stage]

    def round(self, i: int, stage):
        """The same without data: plain rounding, and its error relative to the weights themselves."""
        solved = []
        with self.clock.phase("solve"):
            for name in stage:
                W = self.model.weight(i, name).float()
                qt = rtn(W, self.spec, self.codec.grid(self.model.stored_name(i, name), W.shape[1]))
                error = float((qt.dequantize() - W).square().sum() / W.square().sum().clamp(min=1e-30))
                solved.append((qt, {"error": error, "error_rtn": error}))
        return solved

    def _by_grid(self, i, stage):
        """(grid, linears) of a stage; those of one grid are solved together."""
        groups = []
        for name in stage:
            grid = self.codec.grid(self.model.stored_name(i, name), self.model.weight(i, name).shape[1])
            names = next((names for other, names in groups if other is grid), None)
            if names is None:
                groups.append((grid, [name]))
            else:
                names.append(name)
        return groups

    def _summed_with(self, i, stage):
        """Weights of a stage whose W (G - H) is summed; None where G is."""
        weights = [self.model.weight(i, name) for name in stage]
        return weights if few_rows(sum(map(len, weights)), weights[0].shape[1]) else None

    def _cross_moment(self, i, stage, names, G, last):
        """What some linears of a stage need of G, or of W (G - H), as the solver's argument."""
        if G is None:
            return {}
        if self._summed_with(i, stage) is None:
            return {"G": G if last else G.clone()}
        rows = dict(zip(stage, G.split([len(self.model.weight(i, name)) for name in stage]), strict=True))
        return {"WG": torch.cat([rows[name] for name in names]) if len(names) < len(stage) else G}

    def _coupling(self, i, stage, names, outputs):
        """What some linears of a stage need of H_O."""
        if outputs is None or len(names) == len(stage):
            return outputs
        chosen = torch.cat([torch.full((len(self.model.weight(i, name)),), name in names) for name in stage])
        kept = zip(outputs, chosen.split([len(HO) for HO in outputs]), strict=True)
        return [HO[own][:, own] for HO, own in kept if own.any()]

    def _solve_together(self, i, names, grid, H, cross, outputs, salt):
        """(QuantizedTensor, report entry) by name, of linears that share inputs and grid."""
        weights = [self.model.weight(i, name) for name in names]
        rows, gather = self._own_rows(sum(map(len, weights)), outputs)
        try:
            solution = gptq(
                weights, H, self.spec, grid=grid, **cross, outputs=outputs, seed=self.spec.seed + salt, rows=rows,
                spill=self.sums, clock=self.clock,
            )  # fmt: skip
        except InputError as error:
            raise InputError(f"{self.model.stored_name(i, names[0])}: {error}") from None
        solution, solved, start = solution.gathered(gather), {}, 0
        for name, W in zip(names, weights, strict=True):
            rows = slice(start, start := start + W.shape[0])
            energy = float(solution.energy[rows].sum()) or 1.0
            entry = {
                "error": float(solution.loss[rows].sum()) / energy,
                "error_gptq": float(solution.loss_gptq[rows].sum()) / energy,
                "error_rtn": float(solution.loss_rtn[rows].sum()) / energy,
                "dead_inputs": solution.dead,
                "damp_percent": solution.damp_percent,
            }
            if solution.coupled is not None:
                refined, rounded, zeros = solution.coupled[rows].sum(0).tolist()
                entry |= {"error_coupled": refined / (zeros or 1.0), "error_coupled_gptq": rounded / (zeros or 1.0)}
            solved[name] = solution.quantized.rows(rows), entry
        return solved

    def _own_rows(self, count, outputs):
        """Which of a stage's outputs this rank solves, and what gathers those of all; a run is not divided."""
        if outputs is None:
            units = self.ranks.share(-(-count // ROWS))
            return slice(units.start * ROWS, min(units.stop * ROWS, count)), self.ranks.gather
        if len(outputs) < self.ranks.size:  # each solves them all
            return slice(0, count), ALONE.gather
        ends, own = [0, *accumulate(map(len, outputs))], self.ranks.share(len(outputs))
        return slice(ends[own.start], ends[own.stop]), self.ranks.gather

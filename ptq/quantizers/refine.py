"""Refinement of a rounded matrix under tr(D H D^T), D = Q - W: block coordinate descent, one span after the other.

With everything outside a span held fixed, the loss is a quadratic in the span's columns whose gradient is its part of
R = D H. First the span's stored numbers, codes fixed: a number x with direction u has its minimum at
x - (u . R) / (u H u^T), which is rounded to what the file can store (for a group's scale this is the closed form of
two-stage grids, arXiv 2602.02126). Then its codes, one column after the other: column j's best real value is
q_j - R_j / H_jj; round it on the grid (QuantEase, arXiv 2309.01885). Neither step can raise the loss beyond the
rounding of sums. R is formed span by span, from H and all of D as it is then: one matrix product a round, and nothing
that rounding errors could gather in. (Where products are in bf16, so is R: a code all but half way may go wrong.)

Legend: O outputs (rows), I inputs, c columns of a span; matrices are transposed, (I, O).
"""

from functools import partial

import torch

from calibration.products import factor
from ptq.grids.compiled import compiled
from ptq.quantizers.kernels import sweep_block
from ptq.quantizers.vectors import sweep_vectors

COMPILED_BLOCK = 256  # columns between two local matrix products; a tile of rows of so many fits the second cache
TINY = torch.finfo(torch.float32).tiny


def refine(Wt, H, codes, spans, params, grid, *, rounds, generator, column_block=32):
    """Improves codes and params, in place.

    Args:
        Wt: (I, O) target.
        H: (I, I) damped.
        codes: (I, O), overwritten.
        spans: Span list.
        params: Of every span, overwritten.
        grid: Gives steps, encode, decode and knobs.
        rounds: Passes over all spans.
        generator: Draws the order of spans and of their columns.
        column_block: Columns handled between two local matrix products.

    Returns:
        What the loss of each output went down by (O,).
    """
    D = torch.empty_like(Wt)
    for span, numbers in zip(spans, params, strict=True):
        torch.sub(values(grid, numbers, span, codes[span.columns]), Wt[span.columns], out=D[span.columns])
    gained, of_D = D.new_zeros(D.shape[1]), factor(D)
    for _ in range(rounds):
        for s in torch.randperm(len(spans), generator=generator).tolist():
            local = Local(Wt, H, codes, D, spans[s], of_D)
            gained += local.refit(grid, params[s])
            gained += local.sweep(grid, params[s], generator, column_block)
            of_D[spans[s].columns] = local.D
    return gained


class Local:
    """One span's share of the problem: views of its rows of every matrix, and its gradient.

    `of_D` is D as products take it (calibration/products.py), or None.
    """

    def __init__(self, Wt, H, codes, D, span, of_D=None):
        self.span = span
        rows = H[span.columns]
        self.inner = rows[:, span.columns].contiguous()
        self.gradient = (factor(rows) @ (factor(D) if of_D is None else of_D)).float()
        self.target, self.codes, self.D = Wt[span.columns], codes[span.columns], D[span.columns]

    def refit(self, grid, numbers):
        """Each stored number to its best value, codes fixed; what the loss of each output went down by (O,)."""
        gained = torch.zeros_like(self.gradient[0])
        for knob in grid.knobs(numbers, self.codes, self.span.step):
            gained -= self._turn(knob) if knob.partner is None else self._turn_both(knob, knob.partner)
        torch.sub(values(grid, numbers, self.span, self.codes), self.target, out=self.D)
        return gained

    def _turn(self, knob):
        axis = _Axis(knob, self.inner, self.gradient)
        new = axis.nearest(axis.slope, axis.curvature)
        loss = axis.loss(new - knob.number)
        axis.move(torch.where(loss < 0, new, knob.number), self.gradient)
        return loss.clamp_(max=0)

    def _turn_both(self, knob, partner):
        """Where one number goes to its own best value, to its share of the joint one, or stays; the other follows."""
        first, second = (_Axis(k, self.inner, self.gradient) for k in (knob, partner))
        cross = (first.direction * second.bent[knob.columns]).sum(0)
        share = cross / second.curvature
        joint = first.nearest(first.slope - share * second.slope, first.curvature - share * cross)
        new, new_partner, best = knob.number.clone(), partner.number.clone(), torch.zeros_like(cross)
        for trial in (knob.number.clone(), first.nearest(first.slope, first.curvature), joint):
            change = trial - knob.number
            follower = second.nearest(second.slope + change * cross, second.curvature)
            other = follower - partner.number
            loss = first.loss(change) + second.loss(other) + 2 * change * other * cross
            better = loss < best
            for kept, found in ((new, trial), (new_partner, follower), (best, loss)):
                torch.where(better, found, kept, out=kept)
        first.move(new, self.gradient)
        second.move(new_partner, self.gradient)
        return best

    def sweep(self, grid, numbers, generator, column_block):
        """Coordinate descent over the span's codes, in random order; what each output's loss went down by (O,)."""
        scale, zero = (p.contiguous() for p in grid.steps(numbers))
        order = torch.randperm(len(self.inner) // grid.vector, generator=generator)
        matrices = self.inner, self.target, self.codes, self.D, self.gradient
        if grid.vector > 1:
            return sweep_vectors(grid, scale, zero, *matrices, self.span.step, order)
        if compiled(self.D):
            block = partial(sweep_block, *matrices, scale, zero, self.span.step, grid.arithmetic)
            return self._in_blocks(order, COMPILED_BLOCK, block)
        return self._in_blocks(order, column_block, partial(self._sweep_columns, grid, scale, zero))

    def _in_blocks(self, order, size, sweep):
        """Sweeps some columns at a time; the gradient of all others follows by a matrix product."""
        if len(order) <= size:
            return sweep(order)
        gained = torch.zeros_like(self.gradient[0])
        for columns in order.split(size):
            before = self.D[columns]
            gained += sweep(columns)
            self.gradient.addmm_(self.inner[columns].T, self.D[columns] - before)
        return gained

    def _sweep_columns(self, grid, scale, zero, order):
        gradient, inner, gained = self.gradient[order], self.inner[order][:, order], torch.zeros_like(self.gradient[0])
        for i, j in enumerate(order.tolist()):
            step, curvature = self.span.step[j], inner[i, i]
            best = (self.D[j] + self.target[j]).sub_(gradient[i] / curvature)
            self.codes[j] = grid.encode(best, scale[step], zero[step])
            value = grid.decode(self.codes[j], scale[step], zero[step]) - self.target[j]
            change = value - self.D[j]
            gained -= change * (2 * gradient[i] + change * curvature)
            self.D[j] = value
            gradient[i + 1 :].addr_(inner[i + 1 :, i], change)
        return gained


class _Axis:
    """A knob and what the loss is along it: slope and half the curvature (R,), and H times its direction, bent."""

    def __init__(self, knob, inner, gradient):
        self.knob, self.direction = knob, knob.direction
        self.bent = inner[:, knob.columns] @ knob.direction
        self.slope = (knob.direction * gradient[knob.columns]).sum(0)
        self.curvature = (knob.direction * self.bent[knob.columns]).sum(0).clamp_(min=TINY)

    def nearest(self, slope, curvature):
        """The storable number nearest to the best one; the present one where there is none."""
        number = self.knob.number
        new = self.knob.storable(number - slope / curvature.clamp(min=TINY))
        return torch.where(new.isnan(), number, new)

    def loss(self, change):
        """What a change adds to the loss."""
        return change * (2 * self.slope + change * self.curvature)

    def move(self, new, gradient):
        """Stores new numbers and brings the gradient up to date."""
        gradient.addcmul_(self.bent, new - self.knob.number)
        self.knob.number.copy_(new)


def values(grid, numbers, span, codes):
    """A span's values (c, O)."""
    scale, zero = (p if len(p) == 1 else p[span.step] for p in grid.steps(numbers))
    return grid.decode(codes, scale, zero)

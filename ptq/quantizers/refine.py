"""Refinement of a rounded matrix under tr(D H D^T), D = Q - W: block coordinate descent, one span after the other.

With everything outside a span held fixed, the loss is a quadratic in the span's columns whose gradient is its part of
R = D H. First the span's stored numbers, codes fixed: a number x with direction u has its minimum at
x - (u . R) / (u H u^T), which is rounded to what the file can store (for a group's scale this is the closed form of
two-stage grids, arXiv 2602.02126). Then its codes, one column after the other: column j's best real value is
q_j - R_j / H_jj; round it on the grid (QuantEase, arXiv 2309.01885). Neither step can raise the loss beyond the
rounding of sums. R is kept up to date, which costs one matrix product a round.

Legend: O outputs (rows), I inputs, c columns of a span; matrices are transposed, (I, O).
"""

import torch

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
        D = Q - W (I, O) and R = H D (I, O).
    """
    D = torch.empty_like(Wt)
    for span, numbers in zip(spans, params, strict=True):
        D[span.columns] = _values(grid, numbers, span, codes[span.columns]) - Wt[span.columns]
    R = H @ D
    for _ in range(rounds):
        for s in torch.randperm(len(spans), generator=generator).tolist():
            local = Local(Wt, H, codes, D, R, spans[s])
            local.refit(grid, params[s])
            local.sweep(grid, params[s], generator, column_block)
            local.put_back(codes, D, R)
    return D, R


class Local:
    """One span's share of the problem: views or copies of its rows of every matrix."""

    def __init__(self, Wt, H, codes, D, R, span):
        self.span = span
        self.rows = H[span.columns]
        self.inner = self.rows[:, span.columns]
        self.target, self.codes = Wt[span.columns], codes[span.columns]
        self.D, self.gradient = D[span.columns].clone(), R[span.columns].clone()

    def refit(self, grid, numbers):
        """Each stored number to its best value, codes fixed."""
        for knob in grid.knobs(numbers, self.codes, self.span.step):
            direction = knob.direction
            bent = self.inner[:, knob.columns] @ direction
            slope = (direction * self.gradient[knob.columns]).sum(0)
            curvature = (direction * bent[knob.columns]).sum(0).clamp_(min=TINY)
            new = knob.storable(knob.number - slope / curvature)
            change = new - knob.number
            better = change * (2 * slope + change * curvature) < 0  # False for NaN
            change = torch.where(better, change, 0)
            knob.number.copy_(torch.where(better, new, knob.number))
            self.gradient.addcmul_(bent, change)
        torch.sub(_values(grid, numbers, self.span, self.codes), self.target, out=self.D)

    def sweep(self, grid, numbers, generator, column_block):
        """Coordinate descent over the span's codes, in random order."""
        scale, zero = grid.steps(numbers)
        diagonal = self.inner.diagonal().tolist()
        order = torch.randperm(len(diagonal), generator=generator).to(self.inner.device)
        for columns in order.split(column_block):
            rows = self.inner[columns]
            inner, gradient = rows[:, columns], self.gradient[columns]
            change = torch.empty_like(gradient)
            for i, j in enumerate(columns.tolist()):
                step = self.span.step[j]
                best = (self.D[j] + self.target[j]).sub_(gradient[i], alpha=1 / diagonal[j])
                code = grid.encode(best, scale[step], zero[step])
                value = grid.decode(code, scale[step], zero[step]) - self.target[j]
                torch.sub(value, self.D[j], out=change[i])
                self.codes[j], self.D[j] = code, value
                gradient[i + 1 :].addr_(inner[i + 1 :, i], change[i])
            if len(columns) < len(order):
                self.gradient.addmm_(rows.T, change)

    def put_back(self, codes, D, R):
        """The span's new codes and errors, and what they do to every column's gradient."""
        columns = self.span.columns
        change = self.D - D[columns]
        codes[columns], D[columns] = self.codes, self.D
        R.addmm_(self.rows.T, change)


def _values(grid, numbers, span, codes):
    scale, zero = (p[span.step] for p in grid.steps(numbers))
    return grid.decode(codes, scale, zero)

"""Uniform integer grids: value = scale * (code - zero), code in 0..top, top = 2**bits - 1.

Symmetric grids fix zero at 2**(bits-1) and let the scale be negative, so either tail can hold the extra level; the
one-bit grid is +-scale/2 (zero 0.5), the ternary one -scale, 0, scale (TERNARY bits, that is log2(3); zero 1).
Asymmetric zeros are whole numbers inside the code range, so 0 is always a value.
Scales are rounded to fp16 where they are made, because the file stores them so: nothing is rounded afterwards.

Legend: R rows (one group each), g columns of a group. All functions broadcast; none touches the file layout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from ptq.grids.compiled import compiled, keep_best
from ptq.grids.grid import Arithmetic, Knob

SHRINK_STEPS = 40  # scale candidates; the least-squares steps that follow make a finer search pointless
FINE_STEPS = 2
TRIED_AT_ONCE = 32  # candidates of all rows that are in memory
HALF_MAX = torch.finfo(torch.half).max
TERNARY = 1.58  # what a grid of three values is called, in bits
CHUNK = 1 << 19  # elements searched at once: a few temporaries of this size stay in the second-level cache


def level_count(bits: float) -> int:
    """Codes of a width: 2**bits, and 3 of TERNARY bits."""
    return round(2**bits)


@dataclass(frozen=True)
class AffineGrid:
    """The 2**bits, or three, evenly spaced values of one group."""

    bits: float
    sym: bool
    vector = 1

    @property
    def top(self) -> int:
        """Largest code."""
        return level_count(self.bits) - 1

    @property
    def arithmetic(self) -> Arithmetic:
        """For compiled loops."""
        return Arithmetic("even", self.top)

    @property
    def middle(self) -> float:
        """Zero point of the symmetric grid."""
        return 0.5 if self.bits == 1 else float((self.top + 1) // 2)

    def encode(self, w, scale, zero):
        """Nearest codes, as floats of w's shape; scale and zero broadcast."""
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        return (w / safe + zero).round_().clamp_(0, self.top)

    def decode(self, codes, scale, zero):
        """Values of codes."""
        return scale * (codes - zero)

    def steps(self, params):
        """Scale and zero (1, R): a span is one group."""
        return params[0][None], params[1][None]

    def columns_per_step(self, span: int) -> int:
        """All of a group's."""
        return span

    def knobs(self, params, codes, step) -> Iterator[Knob]:
        """A group's scale; its zero point is left where the search put it."""
        scale, zero = params
        yield Knob(scale, slice(None), codes - zero, _nonzero_half)

    def fit_minmax(self, w):
        """The grid of plain round-to-nearest: spans the smallest and largest weight of each row (and 0).

        Args:
            w: (R, g) weights.

        Returns:
            scale and zero, each (R,).
        """
        if self.bits == 1:  # the mean magnitude minimises the squared error of +-d (XNOR-Net, eq. 6)
            scale = 2 * w.abs().mean(1)
            return half_exact(scale), torch.full_like(scale, 0.5)
        if self.bits == TERNARY:  # the mean magnitude, as in BitNet b1.58 (arXiv 2402.17764, eq. 1 to 3)
            scale = w.abs().mean(1)
            return half_exact(_nonzero(scale)), torch.ones_like(scale)
        if self.sym:
            scale = w.abs().amax(1) * 2 / self.top
            return half_exact(_nonzero(scale)), torch.full_like(scale, self.middle)
        low, high = w.amin(1).clamp_(max=0), w.amax(1).clamp_(min=0)
        scale = half_exact(_nonzero((high - low) / self.top))
        return scale, (-low / scale).round_().clamp_(0, self.top)

    def fit(self, w, weight):
        """The grid that minimises sum_j weight_j (w_j - round(w_j))**2 over scale and zero, found by search.

        Candidates of the scale shrink from the full range; every zero that puts the grid inside the row's range is
        tried (NeUQI, arXiv 2505.17595, searches the same pairs); least squares with codes fixed finishes.

        Args:
            w: (R, g) weights.
            weight: (R, g) or broadcastable, importance of each column, for example the Hessian's diagonal.

        Returns:
            scale and zero, each (R,).
        """
        R, g = w.shape
        w, weight = w.contiguous(), weight.expand(R, g).contiguous()
        step = max(1, CHUNK // g)
        parts = [self._fit_rows(w[r : r + step], weight[r : r + step]) for r in range(0, R, step)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _fit_rows(self, w, weight):
        scale, zero = self.fit_minmax(w)
        best = _error(self, w, weight, scale, zero)
        for candidates in _batches(self.candidates(w), TRIED_AT_ONCE):
            _keep_best(self, w, weight, candidates, scale, zero, best)
        for _ in range(FINE_STEPS):
            v = self.encode(w, scale[:, None], zero[:, None]) - zero[:, None]
            norm = (weight * v * v).sum(1)
            fitted = (weight * w * v).sum(1) / norm.clamp(min=torch.finfo(w.dtype).tiny)
            fitted = torch.where(norm > 0, fitted, scale)
            _keep_best(self, w, weight, [(half_exact(fitted), zero.clone())], scale, zero, best)
        return scale, zero

    def candidates(self, w) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The (scale, zero) pairs that the search tries for weights w (R, g), each (R,)."""
        if self.sym:
            lopsided = self.bits >= 2
            if lopsided:  # from half the range clipped to the shorter side holding the largest weight
                largest, ends = w.abs().amax(1), (0.55 / self.middle, 1.0 / max(self.middle - 1, 1))
            else:  # three values: 0.8 to 3 times the mean magnitude; +-d, half the scale: 0.4 to 1.5 times
                largest, ends = w.abs().mean(1), (0.8, 3.0)
            for share in torch.linspace(*ends, SHRINK_STEPS).tolist():
                scale = half_exact(_nonzero(largest * share))
                zero = torch.full_like(scale, self.middle)
                yield scale, zero
                if lopsided:
                    yield -scale, zero
            return
        low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
        smallest = 0.35 if self.bits <= 2 else 0.5 if self.bits == 3 else 0.7
        for share in torch.linspace(smallest, 1.0, SHRINK_STEPS).tolist():
            scale = half_exact(_nonzero((high - low) * (share / self.top)))
            lowest = -low / scale  # zero that puts code 0 on the smallest weight
            slack = self.top * (1 / share - 1)
            shifts = int(slack) + 1
            for k in range(shifts + 1):
                yield scale, (lowest - slack * k / shifts).round_().clamp_(0, self.top)


def half_exact(scale):
    """Rounds to the nearest finite fp16 value whose half is one too, kept in the tensor's own dtype.

    The halves are what one-bit grids are stored by; only subnormal values are touched by the second condition.
    """
    return 2 * (scale.clamp(-HALF_MAX, HALF_MAX) / 2).half().to(scale.dtype)


def _nonzero_half(scale):
    """half_exact, but NaN for zero: a group whose scale is 0 could never be refitted."""
    rounded = half_exact(scale)
    return torch.where(rounded == 0, torch.nan, rounded)


def _nonzero(scale):
    """An all-zero row gets scale 1: its codes sit on the zero point whatever the scale, and nothing divides by 0."""
    return torch.where(scale > 0, scale.clamp(min=2.0**-23), torch.ones_like(scale))


def _error(grid, w, weight, scale, zero):
    q = grid.decode(grid.encode(w, scale[:, None], zero[:, None]), scale[:, None], zero[:, None])
    return (q.sub_(w).square_() * weight).sum(1)


def _keep_best(grid, w, weight, candidates, scale, zero, best):
    """Overwrites scale, zero and best, in place, in the rows where one of the candidate pairs has a smaller error."""
    if compiled(w):
        scales, zeros = (torch.stack(p) for p in zip(*candidates, strict=True))
        keep_best(w, weight, scales, zeros, grid.top, scale, zero, best)
        return
    for new_scale, new_zero in candidates:
        error = _error(grid, w, weight, new_scale, new_zero)
        better = error < best
        torch.where(better, new_scale, scale, out=scale)
        torch.where(better, new_zero, zero, out=zero)
        torch.where(better, error, best, out=best)


def _batches(pairs, size):
    """Runs of at most `size` of what an iterator gives."""
    while batch := list(islice(pairs, size)):
        yield batch

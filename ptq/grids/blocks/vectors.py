"""Super-blocks of steps with 4-bit scales under one fp16 scale, their columns by vectors of a codebook: IQ2, IQ3.

Legend: R rows (super-blocks), k steps, c columns of a super-block, m columns of a vector.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ptq.grids.blocks.codebook import CODEBOOKS, Codebook
from ptq.grids.blocks.levels import Levelled, half, half_or_nan, nonzero
from ptq.grids.blocks.scaled import columns_of_steps
from ptq.grids.blocks.search import TINY, in_chunks, search_scale
from ptq.grids.grid import Knob

SHARES = 0.8, 1.1  # of the best scale of single columns: what is tried for vectors
CANDIDATES = 4
MOST_SHARES = 1.05, 0.55  # how much of the range of sub-scales the largest step uses, from most to least
SPREADS = 24
POLISH = 1


@dataclass(frozen=True)
class VectorGrid(Levelled):
    """Params (sub, d): a step's scale is d * unit * (2 sub + 1); sub (k, R) whole numbers 0..top, d (R,) in fp16.

    Attributes:
        name: llama.cpp's name of the type, and its codebook's.
        width: Columns of a step.
        unit: Scale of a step at d = 1 and sub = 0.
    """

    name: str
    width: int
    unit: float
    span = 256
    top = 15

    @property
    def book(self) -> Codebook:
        """Which codes may stand side by side."""
        return CODEBOOKS[self.name]

    @property
    def vector(self) -> int:
        """Columns of a vector."""
        return self.book.columns

    @property
    def levels(self):
        """What the code of a single column stands for."""
        return self.book.levels

    def encode(self, w, scale, zero):
        """Nearest codes of w (c, ...), whole vectors one after the other; at scale 0 those of scale 1."""
        scale = nonzero(scale).expand_as(w)
        x, scale = (t.reshape(len(w) // self.vector, self.vector, -1).movedim(1, 2) for t in (w, scale))
        codes = self.book.nearest(x.flatten(0, 1), torch.ones_like(x).flatten(0, 1), scale[..., 0].flatten())
        return codes.view(x.shape).movedim(2, 1).reshape(w.shape)

    def fit(self, w, weight):
        """A real scale for each step by search, then d and whole numbers near them, each step judged by its error."""
        return in_chunks(self._fit_rows, w, weight)

    def fit_minmax(self, w):
        """Each step's largest weight on the largest value, the largest step on the largest sub-scale."""
        scales = w.reshape(len(w), -1, self.width).abs().amax(2) / self.levels.ends[1]
        d = half(scales.amax(1) / (self.unit * (2 * self.top + 1)))
        return self._sub(scales, d).T.contiguous(), d

    def _fit_rows(self, x, weight):
        x, weight = (t.reshape(len(t), -1, self.width) for t in (x, weight))  # (R, k, width)
        scales = self._search(x, weight)
        norm = (self._values(x, weight, scales).square_() * weight).sum(2)
        d, sub = self._spread(scales, norm)
        for _ in range(POLISH):
            d, sub = self._polish(x, weight, d, sub)
        return sub.T.contiguous(), d

    def _search(self, x, weight):
        """(R, k) the scale of each step by least squares on the vectors of the best candidate."""
        single = search_scale(self.levels, x.flatten(0, 1), weight.flatten(0, 1)).view(x.shape[:2]).abs()
        scale, best = torch.zeros_like(single), torch.zeros_like(single)
        for share in torch.linspace(*SHARES, CANDIDATES).tolist():
            v = self._values(x, weight, share * single)
            along, norm = (weight * x * v).sum(2), (weight * v * v).sum(2).clamp_(min=TINY)
            better = along * along > best * norm
            scale, best = torch.where(better, along / norm, scale), torch.where(better, along * along / norm, best)
        return scale

    def _values(self, x, weight, scales):
        """Values at scale 1 of the vectors nearest to x (R, k, width)."""
        scales = nonzero(scales)[..., None].expand(*scales.shape, self.width // self.vector).flatten()
        codes = self.book.nearest(x.reshape(-1, self.vector), weight.reshape(-1, self.vector), scales)
        return self.levels.at_one(codes).view(x.shape)

    def _sub(self, scales, d):
        return ((scales / nonzero(d * self.unit)[:, None] - 1) / 2).round_().clamp_(0, self.top)

    def _scales(self, d, sub):
        return (d * self.unit)[:, None] * (2 * sub + 1)

    def _spread(self, scales, norm):
        """The d (R,) and sub (R, k) with the smallest sum of norm * (scale - that of sub)**2."""
        most = scales.amax(1) / (self.unit * (2 * self.top + 1))
        best, best_error = torch.zeros_like(most), torch.full_like(most, torch.inf)
        for share in torch.linspace(*MOST_SHARES, SPREADS).tolist():
            d = half(most / share)
            error = ((scales - self._scales(d, self._sub(scales, d))).square_() * norm).sum(1)
            better = error < best_error
            torch.where(better, d, best, out=best)
            torch.where(better, error, best_error, out=best_error)
        return best, self._sub(scales, best)

    def _polish(self, x, weight, d, sub):
        """Each step to the best of its neighbouring sub-scales, vectors chosen again; then d by least squares."""
        best, error = sub, self._errors(x, weight, d, sub)
        for change in (-1, 1):
            trial = (sub + change).clamp_(0, self.top)
            trial_error = self._errors(x, weight, d, trial)
            better = trial_error < error
            best, error = torch.where(better, trial, best), torch.where(better, trial_error, error)
        scales = self._scales(d, best)
        v = self._values(x, weight, scales) * (self.unit * (2 * best + 1))[..., None]
        refit = half((v * x * weight).sum((1, 2)) / (v * v * weight).sum((1, 2)).clamp_(min=TINY))
        better = self._errors(x, weight, refit, best).sum(1) < error.sum(1)
        return torch.where(better, refit, d), best

    def _errors(self, x, weight, d, sub):
        """(R, k) weighted squared errors of the steps."""
        scales = self._scales(d, sub)
        return (self._values(x, weight, scales).mul_(scales[..., None]).sub_(x).square_() * weight).sum(2)

    def steps(self, params):
        """Scales and zeros, each (k, R)."""
        sub, d = params
        return d * self.unit * (2 * sub + 1), torch.zeros_like(sub)

    def columns_per_step(self, span: int) -> int:
        """The format's."""
        return self.width

    def knobs(self, params, codes, step) -> Iterator[Knob]:
        """Every sub-scale, then d."""
        sub, d = params
        v = self.levels.at_one(codes) * self.unit
        for number, columns in zip(sub, columns_of_steps(step, len(sub)), strict=True):
            yield Knob(number, columns, 2 * d * v[columns], lambda real: real.round().clamp_(0, self.top))
        yield Knob(d, slice(None), (2 * sub[step] + 1) * v, half_or_nan)

"""Super-blocks of steps with whole-number scales under one fp16 scale: Q3_K, Q6_K, IQ4_XS.

Legend: R rows (super-blocks), k steps, c columns of a super-block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ptq.grids.blocks.levels import Even, Levelled, Table, half_nonzero, half_or_nan
from ptq.grids.blocks.search import TINY, in_chunks, plain_scale, search_scale
from ptq.grids.grid import Knob

MOST_SHARES = 1.0, 0.75  # how much of the range of sub-scales the largest step uses, from most to least
CANDIDATES = 18
POLISH = 2


@dataclass(frozen=True)
class ScaledGrid(Levelled):
    """Params (sub, d): a step's scale is d * sub; sub (k, R) whole numbers in -limit..limit-1, d (R,) in fp16.

    Attributes:
        name: llama.cpp's name of the type.
        width: Columns of a step.
        limit: Bound of sub-scales.
        levels: What codes stand for at scale 1.
    """

    name: str
    width: int
    limit: int
    levels: Even | Table
    span = 256

    def fit(self, w, weight):
        """A real scale for each step by search, then d and whole numbers near them, each step judged by its error."""
        return in_chunks(self._fit_rows, w, weight)

    def fit_minmax(self, w):
        """Each step's largest weight on the largest value, the largest step on the largest sub-scale."""
        scales = plain_scale(self.levels, w.reshape(-1, self.width)).view(len(w), -1)
        d = half_nonzero(_largest(scales) / -self.limit)
        return self._sub(scales / d[:, None]).T.contiguous(), d

    def _fit_rows(self, x, weight):
        x, weight = (t.reshape(len(t), -1, self.width) for t in (x, weight))  # (R, k, width)
        scales = search_scale(self.levels, x.flatten(0, 1), weight.flatten(0, 1)).view(x.shape[:2])
        norm = (self._values(x, scales).square_() * weight).sum(2)
        d, sub = self._round_scales(scales, norm)
        for _ in range(POLISH):
            d, sub = self._polish(x, weight, d, sub)
        return sub.T.contiguous(), d

    def _values(self, x, scales):
        """Values at scale 1 of the codes nearest to x."""
        return self.levels.at_one(self.levels.encode(x, scales[..., None], self.levels.offset))

    def _sub(self, real):
        """Whole numbers; 0 only where there is nothing to scale, or where it is no loss to have no values but 0."""
        rounded = real.round().clamp_(-self.limit, self.limit - 1)
        if isinstance(self.levels, Even):  # other sub-scales have the value 0 as well
            rounded = torch.where(rounded == 0, torch.where(real < 0, -1.0, 1.0).to(real.dtype), rounded)
        return rounded

    def _round_scales(self, scales, norm):
        """The d (R,) and sub (R, k) with the smallest sum of norm * (scale - d * sub)**2."""
        most = _largest(scales) / -self.limit
        best, best_error = torch.zeros_like(most), torch.full_like(most, torch.inf)
        for share in torch.linspace(*MOST_SHARES, CANDIDATES).tolist():
            for sign in (1, -1):
                d = half_nonzero(most * (sign / share))
                sub = self._sub(scales / d[:, None])
                error = ((scales - d[:, None] * sub).square_() * norm).sum(1)
                better = error < best_error
                torch.where(better, d, best, out=best)
                torch.where(better, error, best_error, out=best_error)
        return best, self._sub(scales / best[:, None])

    def _polish(self, x, weight, d, sub):
        """Each step to the best of its neighbouring sub-scales, codes rounded again; then d by least squares."""
        best, error = sub, self._errors(x, weight, d, sub)
        for change in (-1, 1):
            trial = self._sub(sub + change)
            trial_error = self._errors(x, weight, d, trial)
            better = trial_error < error
            best, error = torch.where(better, trial, best), torch.where(better, trial_error, error)
        v = self._values(x, d[:, None] * best) * best[..., None]
        refit = half_nonzero((v * x * weight).sum((1, 2)) / (v * v * weight).sum((1, 2)).clamp_(min=TINY))
        better = self._errors(x, weight, refit, best).sum(1) < error.sum(1)
        return torch.where(better, refit, d), best

    def _errors(self, x, weight, d, sub):
        """(R, k) weighted squared errors of the steps."""
        scale = d[:, None] * sub
        return (self._values(x, scale).mul_(scale[..., None]).sub_(x).square_() * weight).sum(2)

    def steps(self, params):
        """Scales d * sub and the offset, each (k, R)."""
        sub, d = params
        return d * sub, torch.full_like(sub, self.levels.offset)

    def columns_per_step(self, span: int) -> int:
        """The format's."""
        return self.width

    def knobs(self, params, codes, step) -> Iterator[Knob]:
        """Every sub-scale, then d."""
        sub, d = params
        v = self.levels.at_one(codes)
        for number, columns in zip(sub, columns_of_steps(step, len(sub)), strict=True):
            yield Knob(number, columns, d * v[columns], self._storable)
        yield Knob(d, slice(None), sub[step] * v, half_or_nan)

    def _storable(self, real):
        rounded = real.round().clamp_(-self.limit, self.limit - 1)
        return torch.where(rounded == 0, torch.nan, rounded)


def columns_of_steps(step, count) -> list[list[int]]:
    """The columns of each of `count` steps, from the step of each column."""
    columns = [[] for _ in range(count)]
    for column, s in enumerate(step):
        columns[s].append(column)
    return columns


def _largest(scales):
    """(R,) the scale furthest from 0 of each row of (R, k), with its sign."""
    return scales.gather(1, scales.abs().argmax(1, keepdim=True))[:, 0]

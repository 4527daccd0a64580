"""Blocks with one fp16 scale, and with one fp16 scale and minimum.

Legend: R rows (blocks), c columns of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ptq.grids.blocks.levels import Even, Levelled, Ramp, Table, half, half_nonzero, half_or_nan
from ptq.grids.blocks.search import TINY, in_chunks, plain_scale, search_ramp, search_scale, weighted_error
from ptq.grids.grid import Knob


@dataclass(frozen=True)
class SingleGrid(Levelled):
    """Params (d,): d (R,) in fp16, of either sign.

    Attributes:
        name: llama.cpp's name of the type.
        span: Columns of a block.
        levels: What codes stand for at d = 1.
    """

    name: str
    span: int
    levels: Even | Table

    def fit(self, w, weight):
        """Search and least squares for d, w and weight (R, c)."""
        return in_chunks(lambda x, weights: (self._stored(search_scale(self.levels, x, weights)),), w, weight)

    def fit_minmax(self, w):
        """The largest weight on the largest value; one bit: the mean magnitude."""
        return (self._stored(plain_scale(self.levels, w)),)

    def _stored(self, d):
        return half_nonzero(d) if isinstance(self.levels, Even) else half(d)

    def steps(self, params):
        """The block's (d, offset), each (1, R)."""
        d = params[0][None]
        return d, torch.full_like(d, self.levels.offset)

    def columns_per_step(self, span: int) -> int:
        """All."""
        return span

    def knobs(self, params, codes, step) -> Iterator[Knob]:
        """The scale."""
        yield Knob(params[0], slice(None), self.levels.at_one(codes), half_or_nan)


@dataclass(frozen=True)
class RampGrid(Levelled):
    """Params (d, m): value = d * code + m, both (R,) in fp16.

    Attributes:
        name: llama.cpp's name of the type.
        span: Columns of a block.
        levels: A Ramp.
    """

    name: str
    span: int
    levels: Ramp

    def fit(self, w, weight):
        """Search and least squares; once m is rounded, d is the best for it."""
        return in_chunks(self._fit_rows, w, weight)

    def _fit_rows(self, x, weight):
        scale, minimum = search_ramp(self.levels, x, weight, positive=False)
        d, m = half_nonzero(scale), half(-minimum)
        codes = self.levels.encode(x, d[:, None], -m[:, None])
        again = half_nonzero(
            ((x - m[:, None]) * codes * weight).sum(1) / (codes * codes * weight).sum(1).clamp(min=TINY)
        )
        better = weighted_error(self.levels, x, weight, again, -m) < weighted_error(self.levels, x, weight, d, -m)
        return torch.where(better, again, d), m

    def fit_minmax(self, w):
        """From the smallest to the largest weight."""
        low, high = w.aminmax(dim=1)
        return half_nonzero((high - low) / (self.levels.count - 1)), half(low)

    def steps(self, params):
        """The block's (d, -m), each (1, R)."""
        d, m = params
        return d[None], -m[None]

    def columns_per_step(self, span: int) -> int:
        """All."""
        return span

    def knobs(self, params, codes, step) -> Iterator[Knob]:
        """The scale and the minimum, as a pair."""
        d, m = params
        yield Knob(d, slice(None), codes, half_or_nan, Knob(m, slice(None), torch.ones_like(codes), half))

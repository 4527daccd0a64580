"""What codes stand for: three kinds of values, each with llama.cpp's own float32 arithmetic.

    Even    scale * (code - offset)     Q4_0, Q5_0, Q8_0, Q2_0, TQ1_0, TQ2_0, Q3_K, Q6_K
    Table   scale * table[code]         IQ4_NL, IQ4_XS, Q1_0
    Ramp    scale * code - minimum      Q4_1, Q5_1, Q2_K, Q4_K, Q5_K

A step's (scale, zero) pair holds the offset or the minimum as its zero; a table has none. All functions broadcast.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from ptq.grids.grid import Arithmetic

HALF_MAX = torch.finfo(torch.half).max
HALF_TINY = 2.0**-24


@dataclass(frozen=True)
class Even:
    """`count` evenly spaced values, code `offset` standing for 0."""

    count: int
    offset: int

    @property
    def arithmetic(self) -> Arithmetic:
        """For compiled loops."""
        return Arithmetic("even", self.count - 1)

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest value at scale 1."""
        return -self.offset, self.count - 1 - self.offset

    def at_one(self, codes):
        """Values at scale 1."""
        return codes - self.offset

    def encode(self, w, scale, zero):
        """Nearest codes, as floats; at scale 0, where all values are the same, those of scale 1."""
        return (w / nonzero(scale) + zero).round_().clamp_(0, self.count - 1)

    def decode(self, codes, scale, zero):
        """Values of codes."""
        return scale * (codes - zero)


@dataclass(frozen=True)
class Table:
    """The values of an ascending table of whole numbers; 0 need not be among them."""

    table: tuple[int, ...]
    offset = 0

    @property
    def arithmetic(self) -> Arithmetic:
        """For compiled loops."""
        return Arithmetic("table", self.count - 1, self.table)

    @property
    def count(self) -> int:
        """Number of values."""
        return len(self.table)

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest value at scale 1."""
        return self.table[0], self.table[-1]

    def at_one(self, codes):
        """Values at scale 1."""
        return _look_up(_values(self.table, codes.dtype, codes.device), codes)

    def encode(self, w, scale, zero):
        """Nearest codes, as floats; at scale 0, where all values are 0, those of scale 1."""
        halves = (w / nonzero(scale)).mul_(2).ceil_().clamp_(2 * self.table[0], 2 * self.table[-1])
        return _look_up(_nearest(self.table, halves.dtype, halves.device), halves.sub_(2 * self.table[0]))

    def decode(self, codes, scale, zero):
        """Values of codes."""
        return scale * self.at_one(codes)


@dataclass(frozen=True)
class Ramp:
    """`count` evenly spaced values up from -zero."""

    count: int

    @property
    def arithmetic(self) -> Arithmetic:
        """For compiled loops."""
        return Arithmetic("ramp", self.count - 1)

    def encode(self, w, scale, zero):
        """Nearest codes, as floats."""
        return ((w + zero) / nonzero(scale)).round_().clamp_(0, self.count - 1)

    def decode(self, codes, scale, zero):
        """Values of codes: a product, then a difference."""
        return scale * codes - zero


class Levelled:
    """A grid whose codes mean what its `levels` say."""

    levels: Even | Table | Ramp
    vector = 1

    @property
    def arithmetic(self) -> Arithmetic:
        """That of the levels."""
        return self.levels.arithmetic

    def encode(self, w, scale, zero):
        """Nearest codes."""
        return self.levels.encode(w, scale, zero)

    def decode(self, codes, scale, zero):
        """Values."""
        return self.levels.decode(codes, scale, zero)


def half(x):
    """Rounds to the nearest finite fp16 value, kept in the tensor's own dtype."""
    return x.clamp(-HALF_MAX, HALF_MAX).half().to(x.dtype)


def half_nonzero(x):
    """The same, but for 0 the smallest positive value: a scale of 0 would hold every code at its value for good."""
    rounded = half(x)
    return torch.where(rounded == 0, HALF_TINY, rounded)


def half_or_nan(x):
    """The same, but NaN for 0, which no solver shall move a scale to."""
    rounded = half(x)
    return torch.where(rounded == 0, torch.nan, rounded)


def nonzero(scale):
    """Scales with 1 in place of 0, under which any code will do."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


@lru_cache
def _values(table, dtype, device):
    return torch.tensor(table, dtype=dtype, device=device)


@lru_cache
def _nearest(table, dtype, device):
    """Codes for every half from the table's first to its last entry: limits between codes are whole or half numbers."""
    values = _values(table, torch.float64, device)
    halves = torch.arange(2 * table[0], 2 * table[-1] + 1, dtype=torch.float64, device=device) / 2
    return torch.bucketize(halves, (values[1:] + values[:-1]) / 2).to(dtype)


def _look_up(entries, index):
    return entries.index_select(0, index.int().reshape(-1)).view(index.shape)

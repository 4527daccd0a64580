"""What a solver asks of a grid: the set of values that a file format can hold, and how to move inside it.

A row's columns are cut into spans that are fitted together (a group of a GPTQ file, a super-block of llama.cpp), a span
into steps that share one (scale, zero) pair, and a code stands for one value: decode(code, scale, zero). What the file
stores for a span are its params: a tuple of tensors whose last dimension is rows. Params are always exactly storable,
so that packing rounds nothing. Under most grids each column takes any code; under a codebook a few adjacent columns, a
vector, take those of one of its entries.

Legend: R rows, c columns of a span, k numbers of one kind per span.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

Params = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Knob:
    """One stored number a row, along which a span's values are linear.

    Attributes:
        number: (R,) its present value: a view into the params, overwritten by the solver.
        columns: The columns of the span it moves: indices, or all.
        direction: (c', R) derivative of those columns' values.
        storable: Nearest storable numbers of real ones (R,); NaN where there is none.
        partner: Another number of the same columns that is worth moving together with this one.
    """

    number: torch.Tensor
    columns: slice | list[int]
    direction: torch.Tensor
    storable: Callable[[torch.Tensor], torch.Tensor]
    partner: "Knob | None" = None


class Arithmetic(NamedTuple):
    """decode in one of three forms, for loops that are compiled.

    Attributes:
        kind: "even": scale * (code - zero); "ramp": scale * code - zero; "table": scale * table[code].
        top: Largest code.
        table: Ascending whole numbers, of that kind alone.
    """

    kind: str
    top: int
    table: tuple[int, ...] = ()


class Grid(Protocol):
    """The values of one file format.

    Attributes:
        arithmetic: What decode does.
        vector: Adjacent columns whose codes depend on each other, a step being whole vectors; 1 where none do.
    """

    arithmetic: Arithmetic
    vector: int

    def fit(self, w: torch.Tensor, weight: torch.Tensor) -> Params:
        """Params that nearly minimise sum_j weight_j (w_j - nearest value)**2, w and weight (R, c)."""

    def fit_minmax(self, w: torch.Tensor) -> Params:
        """Params of plain round-to-nearest, w (R, c)."""

    def steps(self, params: Params) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of every step, each (steps of a span, R)."""

    def columns_per_step(self, span: int) -> int:
        """Columns that share a (scale, zero) pair."""

    def encode(self, w, scale, zero):
        """Nearest codes as floats; broadcasts. With vectors, w is (c, ...), whole vectors of columns."""

    def decode(self, codes, scale, zero):
        """Values of codes; broadcasts."""

    def knobs(self, params: Params, codes: torch.Tensor, step: list[int]) -> Iterator[Knob]:
        """The numbers a solver may improve, in a good order; each sees the changes before it.

        codes (c, R) are fixed; columns may be shuffled: step tells which (scale, zero) pair each one uses.
        """


class BlockGrid(Grid, Protocol):
    """A grid whose file format fixes the length of a span.

    Attributes:
        name: What the format calls it.
        span: Columns of a block; rows are whole numbers of blocks.
    """

    name: str
    span: int

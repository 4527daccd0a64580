"""Codebooks: vectors of magnitudes that stand for some adjacent columns at once, their signs stored apart.

A vector is one entry, or two that share their signs. Column by column its values are those of a table, so a vector
is held as a code for each column; which codes may stand side by side is what the codebook says. The entries are
llama.cpp's, as the gguf package brings them.

Legend: N entries, w columns of an entry, m columns of a vector, R rows.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from gguf import quants
from numba import njit

from calibration.threads import over_rows
from ptq.grids.blocks.levels import Table
from ptq.grids.compiled import arrays, compiled

SCORES = 1 << 21  # scores of entries held at once
RUN = 64  # entries compared at once in a compiled loop; every codebook is a multiple


@dataclass(frozen=True)
class Codebook:
    """Vectors whose magnitudes are entries and whose signs are free, or with an even number of minus signs.

    Attributes:
        name: Of the type in the gguf package whose entries these are.
        magnitudes: Ascending, of single columns.
        width: Columns of an entry.
        parts: Entries of a vector.
        even: Whether the number of minus signs in a vector is even.
    """

    name: str
    magnitudes: tuple[int, ...]
    width: int
    parts: int = 1
    even: bool = False

    @property
    def columns(self) -> int:
        """Columns of a vector."""
        return self.width * self.parts

    @property
    def levels(self) -> Table:
        """What the code of a column stands for; code count - 1 - q is minus code q."""
        return Table(tuple(-m for m in reversed(self.magnitudes)) + self.magnitudes)

    @cached_property
    def places(self) -> np.ndarray:
        """(N, w) every entry as places in `magnitudes`."""
        source = getattr(quants, self.name)
        source.init_grid()
        values = source.grid.reshape(-1, self.width).astype(np.int64)
        places = np.searchsorted(self.magnitudes, values)
        assert np.array_equal(np.array(self.magnitudes)[places], values)
        return places

    @cached_property
    def entry_of(self) -> np.ndarray:
        """The entry of w places, read as a number in base len(magnitudes), lowest first; -1 where there is none."""
        found = np.full(len(self.magnitudes) ** self.width, -1)
        found[self.places @ self._powers] = np.arange(len(self.places))
        return found

    @cached_property
    def _powers(self):
        return len(self.magnitudes) ** np.arange(self.width)

    @cached_property
    def entries(self) -> torch.Tensor:
        """(N, w) magnitudes."""
        return torch.tensor(np.array(self.magnitudes)[self.places], dtype=torch.float32)

    @cached_property
    def signs(self) -> torch.Tensor:
        """(n, m) of 1 and -1: half of the allowed signs of a vector; the others are their opposites."""
        bits = np.arange(1 << (self.columns - 1))[:, None] >> np.arange(self.columns) & 1
        allowed = bits.sum(1) % 2 == 0 if self.even else slice(None)
        return torch.tensor(1.0 - 2.0 * bits[allowed], dtype=torch.float32)

    def split(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Entries (n, c / w) and minus signs (n, c), 1 for minus, of codes (n, c)."""
        count = len(self.magnitudes)
        minus = codes < count
        places = np.where(minus, count - 1 - codes.astype(np.int64), codes.astype(np.int64) - count)
        return self.entry_of[places.reshape(len(codes), -1, self.width) @ self._powers], minus.astype(np.uint8)

    def join(self, entries: np.ndarray, minus: np.ndarray) -> np.ndarray:
        """Back from them: uint8 (n, c)."""
        count, places = len(self.magnitudes), self.places[entries].reshape(minus.shape)
        return np.where(minus, count - 1 - places, count + places).astype(np.uint8)

    def nearest(self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Vectors that nearly minimise sum_j weight_j (x_j - scale * value)**2; exactly, where signs are free.

        Where their number must be even and that of x is odd, the sign that costs least at the best magnitudes is
        turned, and magnitudes are chosen once more.

        Args:
            x: (R, m).
            weight: (R, m).
            scale: (R,) not 0.

        Returns:
            (R, m) codes, as floats.
        """
        rows = max(1, SCORES // len(self.entries))
        parts = zip(x.split(rows), weight.split(rows), scale.split(rows), strict=True)
        return torch.cat([self._nearest(*part) for part in parts])

    def _nearest(self, x, weight, scale):
        minus, size = (x < 0) ^ (scale < 0)[:, None], scale.abs()
        pull = weight * x.abs()
        places = self._magnitudes(pull, weight, size)
        odd = (minus.sum(1) % 2 == 1).nonzero()[:, 0]
        if self.even and len(odd):
            values = torch.tensor(self.magnitudes, dtype=x.dtype, device=x.device)[places[odd]]
            turned = (values * pull[odd]).argmin(1)
            minus[odd, turned] ^= True
            pull[odd, turned] *= -1
            places[odd] = self._magnitudes(pull[odd], weight[odd], size[odd])
        count = len(self.magnitudes)
        return torch.where(minus, count - 1 - places, count + places).to(x.dtype)

    def _magnitudes(self, pull, weight, size):
        """(R, m) places of the entries that minimise sum_j weight_j size g_j**2 - 2 pull_j g_j."""
        shape, (squares, entries, places) = (-1, self.width), self._arrays(pull)
        curvature, slope = (weight * size[:, None]).reshape(shape), (-2 * pull).reshape(shape)
        if compiled(pull):
            found = torch.empty(len(slope), dtype=torch.int64)
            over_rows(_lowest_entries, len(slope), *arrays(curvature, slope, squares, entries, found))
        else:
            found = (curvature @ squares).addmm_(slope, entries).argmin(1)
        return places[found].view(pull.shape)

    def _arrays(self, like):
        """Squares and magnitudes, each (w, N), and places (N, w) of all entries."""
        entries = self.entries.to(like).T.contiguous()
        return entries.square(), entries, torch.from_numpy(self.places).to(like.device)


@njit(nogil=True, cache=True, fastmath=True)
def _lowest_entries(first, last, curvature, slope, squares, entries, found):
    scores = np.empty(entries.shape[1], np.float32)
    for r in range(first, last):
        scores[:] = 0
        for i in range(len(entries)):
            a, b = curvature[r, i], slope[r, i]
            for e in range(len(scores)):
                scores[e] += a * squares[i, e] + b * entries[i, e]
        found[r] = lowest(scores)


@njit(nogil=True, cache=True, fastmath=True)
def lowest(scores):
    """Place of the smallest of some numbers, a multiple of RUN."""
    best, run = np.float32(np.finfo(np.float32).max), 0
    for start in range(0, len(scores), RUN):
        least = scores[start]
        for e in range(start, start + RUN):
            least = min(least, scores[e])
        if least < best:
            best, run = least, start
    place = run
    while scores[place] != best and place < run + RUN - 1:
        place += 1
    return place


IQ2 = 8, 25, 43
CODEBOOKS = {
    book.name: book
    for book in (
        Codebook("IQ2_XXS", IQ2, 8, even=True),
        Codebook("IQ2_XS", IQ2, 8, even=True),
        Codebook("IQ2_S", IQ2, 8),
        Codebook("IQ3_XXS", (4, 12, 20, 28, 36, 44, 52, 62), 4, parts=2, even=True),
        Codebook("IQ3_S", (1, 3, 5, 7, 9, 11, 13, 15), 4),
    )
}

"""Moments of a stage's inputs, streamed: H = 2/n X^T X, and what the target correction needs besides.

X holds the inputs that the quantized model delivers, X_full those of the full-precision model (one token a row). The
correction wants W (G - H), G = 2/n X_full^T X, for the stage's stacked weights W. Where W has many rows G is summed;
where it has few (`few_rows`), W (G - H) = 2/n ((X_full - X) W^T)^T X itself, with fewer products and less to hold.

The factor 2 and the mean do not change any code, only the printed loss. Products of a batch are fp32, sums over batches
fp64, whose rounding is too fine to show in the fp32 result but by rare chance: H is then the same to the last bit over
however many ranks the batches are spread. (A last bit decides a near tie between codes, and that one all that follow.)

Legend: O outputs, I inputs, T tokens.
"""

import shutil
from functools import partial
from pathlib import Path

import torch

from calibration.bf16_sums import PANEL, TokenSums, in_panels, sums_in_bf16
from calibration.ranks import ALONE, Ranks
from calibration.store import mapped

TILE = 512  # rows of H summed at once: half the products are saved but for the squares on the diagonal
AT_ONCE = 1 << 16  # numbers of a product made fp64 at once: they fit a CPU's second cache


def few_rows(out_features: int, in_features: int) -> bool:
    """Whether summing W (G - H), 2 T O I products a batch, costs less than summing G with its T I I."""
    return 2 * out_features < in_features


class Hessian:
    """Running sums, in tiles of some rows each; of H only what lies right of the tile's first diagonal entry.

    Args:
        in_features: I.
        cross: Also accumulate G; or, given weights, W (G - H).
        weights: Matrices (O, I) that make up W, or None.
        device: Where the sums live.
        counts: (T,) how often each of the first T tokens counts, 1 on average; the others count once.
        folder: Keeps the sums in files, one tile mapped at a time; None for memory.
    """

    def __init__(
        self, in_features: int, *, cross: bool = False, weights=None, counts=None, device="cpu",
        folder: Path | None = None,
    ):  # fmt: skip
        self.size, self.tokens, self.weights, self.counts = in_features, 0, weights, counts
        self.tiles = tiles(in_features)
        self.cross_size = in_features if weights is None else sum(map(len, weights))
        self.cross_tiles = tiles(self.cross_size) if cross else []
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.sums = [self._zeros(tile, in_features - tile.start, device, folder, "H") for tile in self.tiles]
        self.cross_sums = [self._zeros(tile, in_features, device, folder, "G") for tile in self.cross_tiles]
        self._product, self._in_bf16 = None, TokenSums()

    @staticmethod
    def _zeros(tile, width, device, folder, name):
        """What gives a tile's sum: a tensor kept, or a file that is mapped when it is asked for."""
        shape = (tile.stop - tile.start, width)
        if folder is None:
            kept = torch.zeros(shape, dtype=torch.float64, device=device)
            return lambda: kept
        return partial(mapped, folder / f"{name}-{tile.start}.bin", shape, torch.float64, shared=True)

    def add(self, x, x_full=None):
        """Adds tokens.

        Args:
            x: (..., I) inputs of the quantized stream.
            x_full: the same tokens' inputs in the full-precision stream, if `cross`.
        """
        x = x.reshape(-1, x.shape[-1]).float()
        if sums_in_bf16(x):
            self._add_in_bf16(x, x_full)
            return
        counted = x if self.counts is None else x * self._next_counts(len(x))[:, None].to(x)
        for tile, total in zip(self.tiles, self.sums, strict=True):
            self._add_product(total(), x[:, tile].T, counted[:, tile.start :])
        if self.cross_sums:
            rows = self._cross_rows(x, x_full)
            for tile, total in zip(self.cross_tiles, self.cross_sums, strict=True):
                self._add_product(total(), rows[:, tile].T, counted)
        self.tokens += x.shape[0]

    def _add_in_bf16(self, x, x_full):
        """The same by calibration/bf16_sums.py."""
        products = self._in_bf16
        plain = products.packed("x", x)
        counted = plain if self.counts is None else products.packed("counted", x, self._next_counts(len(x)))
        for tile, total in zip(self.tiles, self.sums, strict=True):
            products.add(total(), plain[in_panels(tile)], counted[tile.start // PANEL :], upper=True)
        if self.cross_sums:
            rows = products.packed("rows", self._cross_rows(x, x_full))
            for tile, total in zip(self.cross_tiles, self.cross_sums, strict=True):
                products.add(total(), rows[in_panels(tile)], counted)
        self.tokens += x.shape[0]

    def _add_product(self, total, A, B):
        """Adds A B. The product's memory is used again and again; what a CPU makes fp64 at once fits its cache."""
        if self._product is None:
            self._product = torch.empty(TILE * self.size, device=A.device)
        product = torch.mm(A, B, out=self._product[: total.numel()].view(total.shape))
        rows = max(1, AT_ONCE // total.shape[1]) if total.device.type == "cpu" else TILE
        for sums, addends in zip(total.split(rows), product.split(rows), strict=True):
            sums.add_(addends)

    def _next_counts(self, tokens):
        """(tokens,) how often those to be added count."""
        counts = self.counts[self.tokens : self.tokens + tokens]
        return torch.cat([counts, counts.new_ones(tokens - len(counts))])

    def _cross_rows(self, x, x_full):
        """What the tokens are multiplied with for the cross moment: (T, I) x_full, or (T, O) (x_full - x) W^T."""
        x_full = x_full.reshape(x.shape).float()
        return x_full if self.weights is None else torch.cat([(x_full - x) @ W.float().T for W in self.weights], 1)

    def finalise(self, ranks: Ranks = ALONE):
        """H (I, I) and, if `cross`, G (I, I) or W (G - H) (O, I); fp32, of all ranks' tokens. The sums are consumed."""
        device, self._product, self._in_bf16 = self.sums[0]().device, None, TokenSums()
        tokens = int(ranks.all_reduce(torch.tensor(self.tokens, device=device)))
        mean = lambda sums: ranks.all_reduce(sums.pop(0)()).mul_(2.0 / max(tokens, 1))  # noqa: E731
        H, G = torch.empty(self.size, self.size, device=device), None
        for tile in self.tiles:
            H[tile, tile.start :] = mean(self.sums)
        mirror(H)
        if self.cross_sums:
            G = torch.empty(self.cross_size, self.size, device=device)
            for tile in self.cross_tiles:
                G[tile] = mean(self.cross_sums)
        return H, G


def mirror(matrix: torch.Tensor) -> torch.Tensor:
    """Makes a square matrix symmetric, in place, of which each of `tiles` is there from its first diagonal entry on."""
    for tile in tiles(len(matrix)):
        square = matrix[tile, tile]
        square.copy_(square.triu() + square.triu(1).T)
        matrix[tile.stop :, tile] = matrix[tile, tile.stop :].T
    return matrix


def tiles(size: int, rows: int | None = None) -> list[slice]:
    """Rows of a symmetric matrix that are summed together: TILE, or fewer."""
    rows = rows or TILE
    return [slice(first, min(first + rows, size)) for first in range(0, size, rows)]

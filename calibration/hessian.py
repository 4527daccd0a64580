"""The second moment of a stage's inputs, streamed: H = 2/n X^T X, and G = 2/n X_full^T X.

X holds the inputs that the quantized model delivers, X_full those of the full-precision model (one token a row).
The factor 2 and the mean do not change any code, only the printed loss. Legend: I inputs, T tokens.
"""

import torch

TILE = 512  # columns of H summed at once: half the products are saved but for the tiles on the diagonal


class Hessian:
    """Running sums in fp32; of H, which is symmetric, the tiles on and above the diagonal.

    Args:
        in_features: I.
        cross: Also accumulate G, which the target correction needs.
        device: Where the sums live.
    """

    def __init__(self, in_features: int, *, cross: bool = False, device="cpu"):
        self.sum = torch.zeros(in_features, in_features, device=device)
        self.cross_sum = torch.zeros_like(self.sum) if cross else None
        self.tokens = 0

    def add(self, x, x_full=None):
        """Adds tokens.

        Args:
            x: (..., I) inputs of the quantized stream.
            x_full: the same tokens' inputs in the full-precision stream, if G is wanted.
        """
        x = x.reshape(-1, x.shape[-1]).float()
        for columns in self._tiles():
            right = slice(columns.start, None)
            self.sum[columns, right].addmm_(x[:, columns].T, x[:, right])
        if self.cross_sum is not None:
            self.cross_sum.addmm_(x_full.reshape(x.shape).float().T, x)
        self.tokens += x.shape[0]

    def finalise(self):
        """(H, G or None), each (I, I) fp32; the sums are consumed."""
        for columns in self._tiles():
            below, tile = slice(columns.stop, None), self.sum[columns, columns]
            self.sum[below, columns] = self.sum[columns, below].T
            tile.copy_(tile.triu() + tile.triu(1).T)
        factor = 2.0 / max(self.tokens, 1)
        H, G = self.sum.mul_(factor), self.cross_sum
        self.sum = self.cross_sum = None
        return H, None if G is None else G.mul_(factor)

    def _tiles(self):
        return (slice(start, start + TILE) for start in range(0, len(self.sum), TILE))

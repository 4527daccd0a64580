"""Round to nearest on the grid that spans each group's smallest and largest weight: the baseline, without any data."""

import torch

from ptq.grids.affine import AffineGrid
from ptq.qtensor import QuantizedTensor


def per_group(W, group_size, function, *extra):
    """Applies a grid fit to every group of every row.

    Args:
        W: (O, I).
        group_size: Columns per group; the last group may be shorter.
        function: (R, g) rows, and for each of `extra` its columns, to (scale (R,), zero (R,)).
        extra: (I,) tensors cut into the same groups.

    Returns:
        scale and zero, each (O, G).
    """
    O, I = W.shape
    whole = I // group_size * group_size
    scales, zeros = [], []
    for start, end in ((0, whole), (whole, I)):
        if start == end:
            continue
        width = min(group_size, end - start)
        rows = W[:, start:end].reshape(-1, width)
        cut = [e[start:end].view(1, -1, width).expand(O, -1, -1).reshape(-1, width) for e in extra]
        scale, zero = function(rows, *cut)
        scales.append(scale.view(O, -1))
        zeros.append(zero.view(O, -1))
    return torch.cat(scales, 1), torch.cat(zeros, 1)


def rtn(W, spec) -> QuantizedTensor:
    """Rounds W (O, I) to nearest as `spec` (bits, group_size, sym) says."""
    I = W.shape[1]
    grid, group_size = AffineGrid(spec.bits, spec.sym), spec.columns_per_group(I)
    scale, zero = per_group(W, group_size, grid.fit_minmax)
    g_idx = torch.arange(I, device=W.device) // group_size
    codes = grid.encode(W, scale[:, g_idx], zero[:, g_idx])
    return QuantizedTensor(codes.to(torch.uint8), scale, zero, g_idx.int(), spec.bits, spec.group_size)

"""Round to nearest on the grid that spans each group's smallest and largest weight: the baseline, without any data."""

import torch

from ptq.grids.affine import AffineGrid
from ptq.qtensor import QuantizedTensor
from ptq.quantizers.spans import fit_spans


def rtn(W, spec) -> QuantizedTensor:
    """Rounds W (O, I) to nearest as `spec` (bits, group_size, sym) says."""
    I = W.shape[1]
    grid, group_size = AffineGrid(spec.bits, spec.sym), spec.columns_per_group(I)
    scale, zero = (torch.stack(p, 1) for p in zip(*fit_spans(W, group_size, grid.fit_minmax), strict=True))
    g_idx = torch.arange(I, device=W.device) // group_size
    codes = grid.encode(W, scale[:, g_idx], zero[:, g_idx])
    return QuantizedTensor(codes.to(torch.uint8), scale, zero, g_idx.int(), spec.bits, spec.group_size)

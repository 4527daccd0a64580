"""Round to nearest on the grid that spans each group's smallest and largest weight: the baseline, without any data."""

import torch

from ptq.grids.affine import AffineGrid
from ptq.qtensor import BlockTensor, QuantizedTensor
from ptq.quantizers.spans import fit_spans


def rtn(W, spec, grid=None) -> QuantizedTensor | BlockTensor:
    """Rounds W (O, I) to nearest as `spec` (bits, group_size, sym) says, or on a BlockGrid."""
    I = W.shape[1]
    if grid is not None:
        return _round_blocks(W, fit_spans(W, grid.span, grid.fit_minmax), grid)
    grid, group_size = AffineGrid(spec.bits, spec.sym), spec.columns_per_group(I)
    scale, zero = (torch.stack(p, 1) for p in zip(*fit_spans(W, group_size, grid.fit_minmax), strict=True))
    g_idx = torch.arange(I, device=W.device) // group_size
    codes = grid.encode(W, scale[:, g_idx], zero[:, g_idx])
    return QuantizedTensor(codes.to(torch.uint8), scale, zero, g_idx.int(), spec.bits, spec.group_size)


def round_fitted(W, grid) -> BlockTensor:
    """Rounds W (O, I) to nearest on blocks that are fitted to it by squared error."""
    return _round_blocks(W, fit_spans(W, grid.span, grid.fit, torch.ones(W.shape[1], device=W.device)), grid)


def _round_blocks(W, params, grid) -> BlockTensor:
    width, codes = grid.columns_per_step(grid.span), torch.empty_like(W, dtype=torch.uint8)
    for s, numbers in enumerate(params):
        columns = slice(s * grid.span, (s + 1) * grid.span)
        scale, zero = (p.repeat_interleave(width, 0) for p in grid.steps(numbers))
        codes[:, columns] = grid.encode(W[:, columns].T, scale, zero).to(torch.uint8).T
    return BlockTensor(codes, tuple(map(torch.stack, zip(*params, strict=True))), grid)

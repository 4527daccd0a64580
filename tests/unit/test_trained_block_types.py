"""Linears of llama.cpp's types as functions of positions: nothing changes before a step, gradients are the grid's."""

import pytest
import torch

from ptq.grids.blocks import BLOCK_GRIDS
from ptq.quantizers.reconstruct.block_types import TrainedBlockCodes, Untrained
from ptq.quantizers.reconstruct.parameters import EDGE, limit_positions
from ptq.quantizers.rtn import round_fitted

SCALAR = [name for name, grid in BLOCK_GRIDS.items() if grid.vector == 1]


def solved(name, blocks=2):
    """Weights (6, I) and their nearest values in a type."""
    grid = BLOCK_GRIDS[name]
    W = 0.05 * torch.randn(6, blocks * grid.span, generator=torch.Generator().manual_seed(0))
    return W, round_fitted(W, grid)


@pytest.mark.parametrize("name", BLOCK_GRIDS)
def test_before_the_first_step_nothing_has_changed(name):
    W, start = solved(name)
    kind = TrainedBlockCodes if name in SCALAR else Untrained
    for linear in (kind(start), kind.near(start, W), kind.near(start, 3 * W)):
        assert torch.equal(linear.values(), start.dequantize()) and torch.equal(linear.finish().codes, start.codes)
        assert torch.equal(linear.finish().dequantize(), start.dequantize())
        assert list(linear.leaves()) == (["position"] if name in SCALAR else [])


@pytest.mark.parametrize("name", SCALAR)
def test_gradients_are_the_slope_between_neighbours(name):
    """The value of the next code less that of the one before it, by encoding both and reading them back."""
    W, start = solved(name)
    linear, top = TrainedBlockCodes(start), start.grid.arithmetic.top
    (found,) = torch.autograd.grad(linear.values().sum(), linear.leaves().values())
    below, above = start.codes.clamp(min=1) - 1, start.codes.clamp(max=top - 1) + 1
    low, high = (TrainedBlockCodes(start, codes.T.float()).finish().dequantize() for codes in (below, above))
    expected = (high.double() - low.double()) / (above.double() - below.double())
    # the difference of two fp32 values, each off by half a unit in its last place
    assert torch.allclose(found.T.double(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", SCALAR)
def test_positions_start_where_the_weight_lies_and_stay_in_the_range_of_codes(name):
    W, start = solved(name)
    linear, top = TrainedBlockCodes.near(start, W), start.grid.arithmetic.top
    offset = (linear.position - start.codes.T).T
    nearer = torch.where(offset == 0, 0, torch.sign(offset)) * torch.sign(linear._slope().T)
    assert float(offset.detach().abs().max()) <= EDGE + 1e-5 and bool((nearer * (W - start.dequantize()) >= 0).all())
    moved = TrainedBlockCodes(start, linear.position.detach() + 999)
    limit_positions(moved.position, moved.top)
    assert bool((moved.finish().codes == top).all())

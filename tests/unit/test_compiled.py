"""The compiled search of scales against the loop of torch operators, and against fp64."""

import pytest
import torch
from test_columns import one_thread  # noqa: F401

import ptq.grids.affine
from ptq.grids.affine import AffineGrid
from ptq.grids.compiled import keep_best

GRIDS = [AffineGrid(1, True), AffineGrid(2, True), AffineGrid(3, False), AffineGrid(4, True), AffineGrid(8, True)]


def problem(rows=200, columns=33):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=generator)
    w[5] = 0
    return w, torch.rand(rows, columns, generator=generator)


def weighted_error(grid, w, weight, scale, zero):
    scale, zero = scale.double()[:, None], zero.double()[:, None]
    codes = (w.double() / torch.where(scale == 0, 1, scale) + zero).round().clamp(0, grid.top)
    return (weight.double() * (scale * (codes - zero) - w.double()) ** 2).sum(1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_search_finds_what_operators_find(grid, threads, monkeypatch):
    """Sums in another order: where two candidates differ by rounding alone, either may win, with an equal error."""
    w, weight = problem()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    ours = grid.fit(w, weight)
    monkeypatch.setattr(ptq.grids.affine, "compiled", lambda tensor: False)
    theirs = grid.fit(w, weight)
    same = (ours[0] == theirs[0]) & (ours[1] == theirs[1])
    assert float(same.double().mean()) > 0.97
    errors = [weighted_error(grid, w, weight, *params) for params in (ours, theirs)]
    torch.testing.assert_close(*errors, rtol=2**-23 * w.shape[1], atol=1e-12)


def test_the_best_candidate_is_kept_and_none_that_is_worse():
    grid, (w, weight) = AffineGrid(3, True), problem()
    scales = torch.linspace(0.05, 1.0, 40)[:, None].expand(40, len(w)).contiguous()
    zeros = torch.full_like(scales, grid.middle)
    scale, zero = torch.full((len(w),), 0.5), torch.full((len(w),), grid.middle)
    first = weighted_error(grid, w, weight, scale, zero)
    best = first.float()
    best[7] = 0  # nothing is better than that
    keep_best(w, weight, scales, zeros, grid.top, scale, zero, best)
    errors = torch.stack([weighted_error(grid, w, weight, s, z) for s, z in zip(scales, zeros, strict=True)])
    kept = weighted_error(grid, w, weight, scale, zero)
    others = torch.arange(len(w)) != 7
    least = torch.minimum(errors.amin(0), first)
    assert float((least < first).double().mean()) > 0.9
    torch.testing.assert_close(kept[others], least[others], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(best[others].double(), kept[others], rtol=1e-5, atol=1e-12)
    assert float(scale[7]) == 0.5 and float(best[7]) == 0

"""llama.cpp's block types as grids: nearest codes, storable params, searches, and knobs, against fp64 definitions."""

import pytest
import torch
from test_columns import one_thread  # noqa: F401

from ptq.grids.blocks import BLOCK_GRIDS
from ptq.grids.blocks.levels import HALF_TINY, half

ROWS = 12
SIZES = 1.0, 1e-3, 1e-6, 1e-9, 0.0, 1e6


def sample(grid, seed=0, rows=ROWS, heavy=False):
    """Blocks of weights (rows, span), and importances of their columns."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, grid.span, generator=generator)
    if heavy:
        w /= torch.rand(rows, grid.span, generator=generator) ** 0.4
    return 0.05 * w, torch.exp(torch.randn(rows, grid.span, generator=generator))


def spread(grid, params, step=None):
    """Scale and zero of every column (c, R), columns as they come or as `step` says."""
    width = grid.columns_per_step(grid.span)
    step = [column // width for column in range(grid.span)] if step is None else step
    return (p[step] for p in grid.steps(params))


def rounded(grid, w, params):
    """Nearest values (R, c)."""
    scale, zero = spread(grid, params)
    return grid.decode(grid.encode(w.T, scale, zero), scale, zero).T


def rounded_by_weight(grid, w, weight, params):
    """The same; vectors of a codebook are those that are nearest by these weights."""
    if grid.vector == 1:
        return rounded(grid, w, params)
    scale, _ = spread(grid, params)
    x, weight, scale = (t.reshape(-1, grid.vector) for t in (w, weight, scale.T))
    return (grid.levels.at_one(grid.book.nearest(x, weight, scale[:, 0])) * scale).view(w.shape)


def error(grid, w, weight, params):
    return ((rounded_by_weight(grid, w, weight, params) - w).double().square() * weight).sum(1)


def whole_limits(grid):
    """Smallest and largest of the whole-number params."""
    return (-grid.limit, grid.limit - 1) if hasattr(grid, "limit") else (0, getattr(grid, "top", 0))


def assert_storable(grid, params):
    low, high = whole_limits(grid)
    for number in params:
        assert bool(torch.isfinite(number).all())
        if number.ndim == 1:
            assert torch.equal(number, number.half().float())
        else:
            assert torch.equal(number, number.round()) and low <= number.min() and number.max() <= high


@pytest.mark.parametrize("name", [name for name, grid in BLOCK_GRIDS.items() if grid.vector == 1])
def test_codes_are_the_nearest(name):
    grid = BLOCK_GRIDS[name]
    w, weight = sample(grid)
    scale, zero = spread(grid, grid.fit(w, weight))
    for sign in (1, -1):
        every = torch.arange(grid.levels.count).float()[:, None, None]
        values = grid.decode(every.expand(-1, *w.T.shape), sign * scale, zero)
        distance = (values.double() - w.T.double()).abs()
        codes = grid.encode(w.T, sign * scale, zero)
        found = distance.gather(0, codes.long()[None])[0]
        # Two values that are equally near to within the rounding of w / scale may both be taken.
        assert bool((found <= distance.amin(0) + 2**-20 * values.abs().amax(0)).all())
        assert torch.equal(codes, codes.round()) and codes.min() >= 0 and codes.max() < grid.levels.count


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", BLOCK_GRIDS)
def test_params_are_storable(name, size):
    grid = BLOCK_GRIDS[name]
    w, weight = (size * part if i == 0 else part for i, part in enumerate(sample(grid, 1, heavy=True)))
    w[3] = 0
    w[4, : grid.span // 2] = 0
    w[5] = w[5].abs() + size
    for params in (grid.fit(w, weight), grid.fit_minmax(w)):
        assert_storable(grid, params)
        values = rounded(grid, w, params)
        assert bool(torch.isfinite(values).all())
        # fp16 holds nothing between 0 and 2**-24; a scale of that size cannot be told from it.
        reach = HALF_TINY * grid.levels.count if name not in ("Q1_0", "IQ4_NL", "IQ4_XS") else 0
        assert float(values[3].abs().max()) <= (0 if reach else HALF_TINY)


@pytest.mark.parametrize("name", BLOCK_GRIDS)
def test_rows_are_fitted_independently(name, monkeypatch):
    grid = BLOCK_GRIDS[name]
    w, weight = sample(grid, 2)
    whole = grid.fit(w, weight)
    monkeypatch.setattr("ptq.grids.blocks.search.CHUNK", (ROWS - 1) * grid.span)
    assert all(torch.equal(a, b) for a, b in zip(whole, grid.fit(w, weight), strict=True))
    shared = weight[:1]
    alone = grid.fit(w[2:5], shared)
    assert all(torch.equal(a[..., 2:5], b) for a, b in zip(grid.fit(w, shared), alone, strict=True))


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("name", BLOCK_GRIDS)
def test_the_search_beats_the_plain_fit_and_scale_by_scale_trials(name, heavy):
    """Per row at most the plain fit's error; on average less than any common rescaling of it."""
    grid = BLOCK_GRIDS[name]
    w, weight = sample(grid, 3, rows=48, heavy=heavy)
    found, plain = grid.fit(w, weight), grid.fit_minmax(w)
    ours, theirs = error(grid, w, weight, found), error(grid, w, weight, plain)
    assert float((ours <= theirs).double().mean()) > 0.95 and float((ours / theirs).max()) < 1.05
    for share in torch.linspace(0.4, 1.1, 15).tolist():
        rescaled = tuple(half(share * number) if number.ndim == 1 else number for number in plain)
        assert float(ours.sum()) < float(error(grid, w, weight, rescaled).sum())


@pytest.mark.parametrize("name", BLOCK_GRIDS)
def test_knobs_are_what_they_say(name):
    """Values are linear along each number: its direction, measured in fp64, on its columns and nowhere else."""
    grid = BLOCK_GRIDS[name]
    w, weight = sample(grid, 4)
    shuffled = torch.randperm(grid.span, generator=torch.Generator().manual_seed(0))
    step = (shuffled // grid.columns_per_step(grid.span)).tolist()
    params = grid.fit(w, weight)
    codes = grid.encode(w[:, shuffled].T, *spread(grid, params, step))
    params = tuple(p.double() for p in params)
    turned = set()
    knobs = [knob for first in grid.knobs(params, codes.double(), step) for knob in (first, first.partner) if knob]
    for knob in knobs:
        before, number = grid.decode(codes.double(), *spread(grid, params, step)), knob.number.clone()
        assert torch.equal(knob.storable(number), number)
        knob.number.add_(1)
        moved = grid.decode(codes.double(), *spread(grid, params, step)) - before
        expected = torch.zeros_like(moved)
        expected[knob.columns] = knob.direction
        # Each side is a few fp64 products of numbers up to 2**8 times 0.05.
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)
        knob.number.copy_(number)
        stored = knob.storable(torch.linspace(-300, 300, ROWS).double())
        assert bool((stored.isnan() | (stored == stored.half())).all())
        turned.add(knob.number.data_ptr())
    assert turned == {row.data_ptr() for number in params for row in (number if number.ndim == 2 else [number])}

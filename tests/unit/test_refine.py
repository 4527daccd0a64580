"""Refinement against dense least squares and a naive coordinate descent, both in fp64."""

from copy import deepcopy
from functools import lru_cache

import pytest
import torch
from test_columns import GRIDS, GROUP, INPUTS, OUTPUTS, correlated, damped, nearest_code, one_thread, trace  # noqa: F401

from ptq.grids.affine import AffineGrid
from ptq.quantizers.refine import refine, refit_scales, spread, sweep_codes

HALF_ULP = 2**-11  # relative, of a normal fp16 number
GROUPS = -(-INPUTS // GROUP)


@lru_cache
def fitted(bits, sym, seed, size):
    """Codes rounded to nearest on fitted groups: refinement's input."""
    return Case(bits, sym, seed, size)


def start(bits, sym, seed=0, size=1.0):
    """A case of one's own."""
    return deepcopy(fitted(bits, sym, seed, size))


class Case:
    """What refinement is given and overwrites, with fp64 arithmetic for its judge."""

    def __init__(self, bits, sym, seed, size):
        W, _, H = correlated(seed)
        self.grid, self.W, self.H = AffineGrid(bits, sym), (W * size).float(), damped(H).float()
        columns = self.W.split(GROUP, 1)
        weight = self.H.diagonal()[None].split(GROUP, 1)
        fits = [self.grid.fit(w, h) for w, h in zip(columns, weight, strict=True)]
        self.scale, self.zero = (torch.stack(p) for p in zip(*fits, strict=True))
        self.codes = self.grid.encode(self.W.T, spread(self.scale, GROUP, INPUTS), spread(self.zero, GROUP, INPUTS))

    @property
    def given(self):
        return self.W.T.contiguous(), self.H, self.codes, self.scale, self.zero

    def values(self, scale=None):
        scale = self.scale if scale is None else scale
        return (spread(scale, GROUP, INPUTS).double() * (self.codes - spread(self.zero, GROUP, INPUTS)).double()).T

    def loss(self, scale=None):
        return trace(self.values(scale) - self.W.double(), self.H.double())

    @property
    def energy(self):
        return trace(self.W.double(), self.H.double())

    def refit(self):
        refit_scales(*self.given, GROUP)

    def sweep(self, order, column_block=128):
        return sweep_codes(
            *self.given[:3], self.scale, self.zero, self.grid, GROUP, order=order, column_block=column_block
        )


def least_squares_scales(case):
    """(G, O) fp64: each row's design matrix written out, weighted by a factor of H; unused groups keep their scale."""
    factor = torch.linalg.cholesky(case.H.double())
    best = case.scale.double()
    v = (case.codes - spread(case.zero, GROUP, INPUTS)).double()
    for row in range(OUTPUTS):
        design = torch.zeros(INPUTS, GROUPS, dtype=torch.float64)
        for column in range(INPUTS):
            design[column, column // GROUP] = v[column, row]
        used = design.abs().sum(0) > 0
        if bool(used.any()):
            target = factor.T @ case.W[row].double()[:, None]
            best[used, row] = torch.linalg.lstsq(factor.T @ design[:, used], target, driver="gelsd").solution[:, 0]
    return best


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_refit_is_the_dense_least_squares(bits, sym, seed):
    case = start(bits, sym, seed)
    case.codes[:GROUP, 3] = case.zero[0, 3]  # on the zero point (0.5 at one bit is no code, but works the same)
    case.codes[2 * GROUP :, 4] = case.zero[2, 4]
    case.codes[:, 5] = spread(case.zero, GROUP, INPUTS)[:, 5]
    expected, before, codes = least_squares_scales(case), case.scale.clone(), case.codes.clone()
    loss = case.loss()
    case.refit()
    assert torch.equal(case.codes, codes)
    assert torch.equal(case.scale, case.scale.half().float())
    assert torch.equal(case.scale[0, 3], before[0, 3]) and torch.equal(case.scale[2, 4], before[2, 4])
    assert torch.equal(case.scale[:, 5], before[:, 5])
    # A row either gains, and then holds the rounded solution (one ulp: fp32 sums may tip the rounding), or stays.
    stayed = (case.scale == before).all(0)
    torch.testing.assert_close(case.scale.double()[:, ~stayed], expected[:, ~stayed], rtol=3 * HALF_ULP, atol=0)
    rounded = case.loss(expected.half().float())
    assert bool((rounded >= loss * (1 - 1e-4))[stayed].all()) and not bool(stayed.all())
    assert bool((case.loss() <= torch.minimum(loss, rounded) + 2**-20 * case.energy).all())


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-7])  # small ones have scales subnormal in fp16
@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_no_step_raises_any_rows_loss(bits, sym, size):
    """Up to the fp32 sums that steps are judged by: a few 2**-24 of the row's energy."""
    case = start(bits, sym, 2, size)
    slack, generator = 2**-22 * case.energy, torch.Generator().manual_seed(0)
    first = last = case.loss()
    for _ in range(6):
        case.refit()
        refitted = case.loss()
        assert bool((refitted <= last + slack).all())
        case.sweep(torch.randperm(INPUTS, generator=generator))
        swept = case.loss()
        assert bool((swept <= refitted + slack).all())
        last = swept
    if size == 1:
        assert float(last.sum() / first.sum()) < 0.7
    assert bool(torch.isfinite(case.scale).all()) and torch.equal(case.codes, case.codes.round())
    assert bool((case.scale != 0).all()), "a group whose scale is 0 could never be refitted"
    assert case.codes.min() >= 0 and case.codes.max() <= case.grid.top


def test_a_refit_that_rounding_makes_worse_is_not_taken():
    """Scales of a few fp16 steps: the least-squares ones, once rounded, are worse than the old ones in some rows."""
    cases = [start(2, True, 2, 3e-7), start(2, False, 2, 3e-7), start(3, False, 2, 1e-6)]
    generator, refused = torch.Generator().manual_seed(0), 0
    for _ in range(3):
        for case in cases:
            rounded, before = case.loss(least_squares_scales(case).half().float()), case.loss()
            worse, scale = rounded > 1.001 * before, case.scale.clone()
            case.refit()
            assert torch.equal(case.scale[:, worse], scale[:, worse])
            refused += int(worse.sum())
            case.sweep(torch.randperm(INPUTS, generator=generator))
    assert refused > 5


def naive_sweep(case, order):
    """Coordinate descent in fp64: every gradient from scratch, every code by comparison with all values."""
    W, H, codes = case.W.double(), case.H.double(), case.codes.T.double()
    scale, zero = (spread(p, GROUP, INPUTS).T.double() for p in (case.scale, case.zero))
    Q, margin = scale * (codes - zero), torch.ones(OUTPUTS).double()
    for j in order.tolist():
        best = Q[:, j] - (Q - W) @ H[:, j] / H[j, j]
        codes[:, j], to_tie = nearest_code(best, scale[:, j], zero[:, j], case.grid.top)
        Q[:, j] = scale[:, j] * (codes[:, j] - zero[:, j])
        margin = torch.minimum(margin, to_tie)
    return codes.T, margin


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_sweep_is_the_naive_coordinate_descent(bits, sym, shuffled):
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(INPUTS, generator=generator) if shuffled else torch.arange(INPUTS)
    codes, margin = naive_sweep(start(bits, sym), order)
    assert float((codes != start(bits, sym).codes).double().mean()) > 0.02, "the sweep has something to do"
    # best = q - (D H)_j / H_jj is a sum of INPUTS fp32 terms of up to 2**bits steps; rows nearer to a tie may differ.
    clear = margin > 2**-23 * 2**bits * INPUTS
    assert clear.double().mean() > 0.6
    for column_block in (1, 7, 32, 128):
        case = start(bits, sym)
        scale = case.scale.clone()
        R, Q = case.sweep(order, column_block)
        assert torch.equal(case.codes[:, clear].double(), codes[:, clear])
        assert torch.equal(case.scale, scale) and torch.equal(Q.double(), case.values().float().double().T)
        D, H = (Q - case.W.T).double(), case.H.double()
        torch.testing.assert_close(R.double(), H @ D, rtol=0, atol=2**-23 * INPUTS * float((H.abs() @ D.abs()).max()))


def test_refine_alternates_and_ends_with_a_refit():
    def run(rounds, seed):
        case = start(2, True, 1)
        generator = torch.Generator().manual_seed(seed)
        refine(*case.given, case.grid, GROUP, rounds=rounds, generator=generator, column_block=32)
        return case

    before = start(2, True, 1)
    untouched = run(0, 0)
    assert torch.equal(untouched.codes, before.codes) and torch.equal(untouched.scale, before.scale)
    losses = [float(run(rounds, 0).loss().sum()) for rounds in (0, 1, 2, 4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.7 * losses[0]
    by_hand, generator = start(2, True, 1), torch.Generator().manual_seed(7)
    for _ in range(3):
        by_hand.refit()
        by_hand.sweep(torch.randperm(INPUTS, generator=generator), 32)
    by_hand.refit()
    done = run(3, 7)
    assert torch.equal(done.codes, by_hand.codes) and torch.equal(done.scale, by_hand.scale)
    assert not torch.equal(done.codes, run(3, 8).codes)


def test_rows_are_refined_independently():
    whole, part = start(2, False), start(2, False)
    rows = slice(5, 9)
    part.W, part.codes = part.W[rows], part.codes[:, rows].contiguous()
    part.scale, part.zero = part.scale[:, rows].contiguous(), part.zero[:, rows].contiguous()
    for case in (whole, part):
        generator = torch.Generator().manual_seed(0)
        refine(*case.given, case.grid, GROUP, rounds=2, generator=generator)
    assert torch.equal(whole.codes[:, rows], part.codes)
    torch.testing.assert_close(whole.scale[:, rows], part.scale, rtol=2 * HALF_ULP, atol=0)


def test_spread_gives_each_column_its_groups_value():
    per_group = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    assert spread(per_group, 2, 5).tolist() == [[1, 10], [1, 10], [2, 20], [2, 20], [3, 30]]

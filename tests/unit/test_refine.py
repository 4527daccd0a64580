"""Refinement against one-dimensional least squares and a naive coordinate descent, both in fp64."""

from copy import deepcopy
from functools import lru_cache

import pytest
import torch
from test_columns import GRIDS, GROUP, INPUTS, OUTPUTS, correlated, damped, nearest_code, one_thread, trace  # noqa: F401

from ptq.grids.affine import AffineGrid
from ptq.quantizers.refine import Local, refine
from ptq.quantizers.spans import cut_spans, fit_spans

HALF_ULP = 2**-11  # relative, of a normal fp16 number


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
        self.spans = cut_spans(INPUTS, GROUP, GROUP)
        self.params = fit_spans(self.W, GROUP, self.grid.fit, self.H.diagonal())
        self.codes = self.grid.encode(self.W.T.contiguous(), *self.spread())

    def spread(self):
        """scale and zero (I, O)."""
        both = torch.empty(2, INPUTS, OUTPUTS)
        for span, params in zip(self.spans, self.params, strict=True):
            both[:, span.columns] = torch.stack(params)[:, None]
        return both[0], both[1]

    def values(self):
        scale, zero = self.spread()
        return (scale.double() * (self.codes - zero).double()).T

    def loss(self):
        return trace(self.values() - self.W.double(), self.H.double())

    @property
    def energy(self):
        return trace(self.W.double(), self.H.double())

    def refine(self, rounds=1, seed=0, column_block=128):
        return refine(
            self.W.T.contiguous(), self.H, self.codes, self.spans, self.params, self.grid,
            rounds=rounds, generator=torch.Generator().manual_seed(seed), column_block=column_block,
        )  # fmt: skip

    def local(self, s):
        """One span, opened; the two steps on it are methods of what is returned."""
        Wt = self.W.T.contiguous()
        D = self.values().float().T.contiguous() - Wt
        return Local(Wt, self.H, self.codes, D, self.spans[s])

    def refit(self, s):
        self.local(s).refit(self.grid, self.params[s])

    def sweep(self, s, seed=0, column_block=128):
        local = self.local(s)
        local.sweep(self.grid, self.params[s], torch.Generator().manual_seed(seed), column_block)
        self.codes[self.spans[s].columns] = local.codes


def best_scale(case, s):
    """(O,) fp64: minimises the loss over one group's scale, everything else fixed, on a factor of H."""
    factor, columns = torch.linalg.cholesky(case.H.double()), case.spans[s].columns
    direction = torch.zeros(INPUTS, OUTPUTS, dtype=torch.float64)
    direction[columns] = (case.codes[columns] - case.params[s][1]).double()
    rest = case.W.double() - case.values() + (direction * case.params[s][0].double()).T
    design, target = factor.T @ direction, factor.T @ rest.T
    return (design * target).sum(0) / design.square().sum(0)


@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_refit_is_least_squares(bits, sym):
    case = start(bits, sym)
    columns = case.spans[1].columns
    case.codes[columns, 3] = case.params[1][1][3]  # on the zero point (0.5 at one bit is no code, but works the same)
    expected, before, codes, loss = best_scale(case, 1), case.params[1][0].clone(), case.codes.clone(), case.loss()
    others = [p[0].clone() for p in case.params]
    case.refit(1)
    new = case.params[1][0]
    assert torch.equal(case.codes, codes) and torch.equal(new, new.half().float())
    assert all(torch.equal(p[0], o) for s, (p, o) in enumerate(zip(case.params, others, strict=True)) if s != 1)
    assert new[3] == before[3], "codes that all sit on the zero point say nothing about the scale"
    # A row either gains, and then holds the rounded solution (one ulp: fp32 sums may tip the rounding), or stays.
    moved = new != before
    assert float(moved.double().mean()) > 0.5
    torch.testing.assert_close(new.double()[moved], expected[moved], rtol=3 * HALF_ULP, atol=0)
    assert bool((case.loss() <= loss + 2**-22 * case.energy).all())


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-7])  # small ones have scales subnormal in fp16
@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_no_step_raises_any_rows_loss(bits, sym, size):
    """Up to the fp32 sums that steps are judged by: a few 2**-24 of the row's energy."""
    case = start(bits, sym, 2, size)
    slack = 2**-22 * case.energy
    first = last = case.loss()
    for round_ in range(3):
        for s in range(len(case.spans)):
            case.refit(s)
            refitted = case.loss()
            assert bool((refitted <= last + slack).all())
            case.sweep(s, round_)
            last = case.loss()
            assert bool((last <= refitted + slack).all())
    if size == 1:
        assert float(last.sum() / first.sum()) < 0.7
    for scale, _ in case.params:
        assert bool(torch.isfinite(scale).all()) and torch.equal(scale, scale.half().float())
        assert bool((scale != 0).all()), "a group whose scale is 0 could never be refitted"
    assert torch.equal(case.codes, case.codes.round())
    assert case.codes.min() >= 0 and case.codes.max() <= case.grid.top


def naive_sweep(case, s, order):
    """Coordinate descent in fp64: every gradient from scratch, every code by comparison with all values."""
    W, H, codes, Q = case.W.double(), case.H.double(), case.codes.T.double(), case.values()
    places = torch.arange(INPUTS)[case.spans[s].columns]
    scale, zero = (p.double() for p in case.params[s])
    margin = torch.ones(OUTPUTS).double()
    for j in places[order].tolist():
        best = Q[:, j] - (Q - W) @ H[:, j] / H[j, j]
        codes[:, j], to_tie = nearest_code(best, scale, zero, case.grid.top)
        Q[:, j] = scale * (codes[:, j] - zero)
        margin = torch.minimum(margin, to_tie)
    return codes.T, margin


@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_sweep_is_the_naive_coordinate_descent(bits, sym):
    for s in (0, 2):
        given = start(bits, sym)
        places = torch.arange(INPUTS)[given.spans[s].columns]
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(1))
        codes, margin = naive_sweep(given, s, order)
        assert float((codes != given.codes).double().mean()) > 0.002, "the sweep has something to do"
        # best = q - (D H)_j / H_jj is a sum of INPUTS fp32 terms of up to 2**bits steps; rows near a tie may differ.
        clear = margin > 2**-23 * 2**bits * INPUTS
        assert clear.double().mean() > 0.6
        for column_block in (1, 7, 32, 128):
            case = start(bits, sym)
            case.sweep(s, 1, column_block)
            assert torch.equal(case.codes[:, clear].double(), codes[:, clear])


def test_refine_keeps_the_books():
    """What it says it gained is the loss before less the loss after, up to fp32 sums of INPUTS terms."""
    for rounds in (0, 3):
        case = start(2, True, 1)
        before, codes = case.loss(), case.codes.clone()
        gained = case.refine(rounds, column_block=7)
        torch.testing.assert_close(gained.double(), before - case.loss(), rtol=2**-23 * INPUTS, atol=0)
        assert torch.equal(case.codes, codes) == (rounds == 0)


def test_rounds_and_seeds():
    def run(rounds, seed=0):
        case = start(2, True, 1)
        case.refine(rounds, seed)
        return case

    losses = [float(run(rounds).loss().sum()) for rounds in (0, 1, 2, 4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.7 * losses[0]
    assert torch.equal(run(2, 7).codes, run(2, 7).codes)
    assert not torch.equal(run(2, 7).codes, run(2, 8).codes)


def test_rows_are_refined_independently():
    whole, part = start(2, False), start(2, False)
    rows = slice(5, 9)
    part.W, part.codes = part.W[rows], part.codes[:, rows].contiguous()
    part.params = [tuple(p[rows].contiguous() for p in params) for params in part.params]
    for case in (whole, part):
        case.refine(2)
    assert torch.equal(whole.codes[:, rows], part.codes)
    for ours, theirs in zip(whole.params, part.params, strict=True):
        torch.testing.assert_close(ours[0][rows], theirs[0], rtol=2 * HALF_ULP, atol=0)

"""The solver under H_O x H against textbook methods on the Kronecker product itself, in fp64."""

from dataclasses import replace

import pytest
import torch
from test_columns import correlated, damped, one_thread, remaining_inverses, surgeon  # noqa: F401

import ptq.quantizers.coupled as coupled
import ptq.quantizers.gptq
from calibration.ranks import ALONE, Ranks
from ptq.grids.affine import TERNARY, AffineGrid
from ptq.grids.blocks import BLOCK_GRIDS
from ptq.quantizers import chunks
from ptq.quantizers.chunks import ROWS, coupled_cuts
from ptq.quantizers.columns import FixedParams, damped_factor
from ptq.quantizers.coupled import (
    FISHER_DAMP,
    coupled_loss,
    errors,
    normalised,
    quantize_coupled,
    refine_coupled,
)
from ptq.quantizers.gptq import gptq
from ptq.quantizers.spans import cut_spans, fit_spans
from ptq.spec import QuantSpec
from ptq.stages import StageSolver

OUTPUTS, INPUTS, GROUP = 6, 20, 8  # 120 weights; the last group is ragged
GRIDS = [AffineGrid(bits, sym) for bits, sym in ((1, True), (TERNARY, True), (2, True), (2, False), (4, True))]
HALF_ULP = 2**-11


class Case:
    """A small problem: weights (O, I), H and H_O in fp64, and fitted groups."""

    def __init__(self, grid, seed=0, outputs=OUTPUTS, inputs=INPUTS, group=GROUP):
        W, _, H = correlated(seed, outputs, inputs)
        _, _, HO = correlated(seed + 7, 2, outputs)
        self.grid, self.W, self.H = grid, W.float().double(), damped(H).float().double()
        self.HO = normalised(HO.float()).double()
        self.spans = cut_spans(inputs, group, grid.columns_per_step(group))
        self.params = fit_spans(W.float(), group, grid.fit, self.H.diagonal().float())
        self.kronecker = torch.kron(self.H, self.HO)  # columns first, rows within a column
        self.Wt = self.W.float().T.contiguous()
        self.codes = torch.stack([self.nearest(j) for j in range(inputs)])

    def numbers(self, j):
        """scale and zero (O,) of column j."""
        s = next(k for k, span in enumerate(self.spans) if span.columns.start <= j < span.columns.stop)
        step = self.spans[s].step[j - self.spans[s].columns.start]
        return tuple(p[step] for p in self.grid.steps(self.params[s]))

    def nearest(self, j):
        return self.grid.encode(self.Wt[j], *self.numbers(j))

    def values(self):
        """(I, O) fp64."""
        pairs = (self.numbers(j) for j in range(len(self.codes)))
        columns = zip(self.codes.double(), pairs, strict=True)
        return torch.stack([self.grid.decode(code, scale.double(), zero.double()) for code, (scale, zero) in columns])

    def loss(self):
        d = (self.values() - self.W.T).flatten()
        return float(d @ self.kronecker @ d)

    def refine(self, rounds=1, seed=0):
        refine_coupled(
            self.Wt, self.H.float(), self.HO.float(), self.codes, self.spans, self.params, self.grid,
            rounds=rounds, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    def local(self, s):
        D = errors(self.Wt, self.codes, self.spans, self.params, self.grid)
        return coupled._Coupled(self.Wt, self.H.float(), self.HO.float(), self.codes, D, self.spans[s])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("block", [7, 128])
def test_rounding_is_the_surgeons_on_the_kronecker_product(grid, block, monkeypatch):
    """Weight by weight, column by column and within one by rows of falling H_O: the same codes, ties apart."""
    monkeypatch.setattr(coupled, "ROW_BLOCK", min(block, 4))
    equal = []
    for seed in range(4):
        case = Case(grid, seed)
        columns, rows = case.H.diagonal().argsort(descending=True), case.HO.diagonal().argsort(descending=True)
        scale, zero = (torch.stack(p) for p in zip(*(case.numbers(j) for j in range(INPUTS)), strict=True))
        given = FixedParams(scale, zero, columns.tolist())
        U, _ = damped_factor(case.H.float().clone(), 1e-9, columns)
        codes = quantize_coupled(case.Wt, columns, U, case.HO.float(), grid, given, column_block=block)

        K = torch.kron(case.H[columns][:, columns], case.HO[rows][:, rows])
        flat = case.W.T[columns][:, rows].reshape(1, -1)
        numbers = lambda k, _: (  # noqa: E731
            scale[columns[k // OUTPUTS], rows[k % OUTPUTS]].double()[None],  # noqa: B023
            zero[columns[k // OUTPUTS], rows[k % OUTPUTS]].double()[None],  # noqa: B023
        )
        expected, _, margin = surgeon(flat, remaining_inverses(K), grid, numbers)
        # fp32 sums of 120 terms, each some steps of the grid (16 at most): a target is off by 120 * 16 * 2**-24 steps
        if float(margin) > 120 * 16 * 2**-24:
            equal.append(torch.equal(codes[:, rows].reshape(1, -1).double(), expected))
    assert len(equal) >= 3 and all(equal)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_sweep_is_the_naive_coordinate_descent(grid):
    """Every gradient from scratch, every code by comparison of losses on the Kronecker product."""
    case = Case(grid, 1)
    order = torch.randperm(GROUP, generator=torch.Generator().manual_seed(3))
    scale, zero = (p[0].double() for p in grid.steps(case.params[1]))
    Q, codes = case.values(), case.codes.clone()
    for j in order.tolist():
        for o in range(OUTPUTS):
            every = torch.arange(grid.top + 1).double()
            trials = []
            for value in grid.decode(every, scale[o], zero[o]):
                D = Q - case.W.T
                D[GROUP + j, o] = value - case.W[o, GROUP + j]
                trials.append(float(D.flatten() @ case.kronecker @ D.flatten()))
            best = int(torch.tensor(trials).argmin())
            codes[GROUP + j, o], Q[GROUP + j, o] = best, grid.decode(every[best], scale[o], zero[o])
    assert not torch.equal(codes, case.codes), "the sweep has something to do"
    before = case.loss()
    case.local(1).sweep(grid, case.params[1], torch.Generator().manual_seed(3))
    assert torch.equal(case.codes, codes) and case.loss() < before


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_number_goes_to_its_best_value(grid, monkeypatch):
    """One row at a time, the last row that moves ends at its least-squares scale on the Kronecker product."""
    monkeypatch.setattr(coupled, "TURNED", 1)
    case, before = Case(grid, 2), None
    before, codes = case.loss(), case.codes.clone()
    case.local(0).refit(grid, case.params[0], torch.Generator().manual_seed(0))
    assert torch.equal(case.codes, codes) and case.loss() < before
    assert torch.equal(case.params[0][0], case.params[0][0].half().float())
    last = torch.randperm(OUTPUTS, generator=torch.Generator().manual_seed(0))[-1]
    direction = torch.zeros(INPUTS, OUTPUTS, dtype=torch.float64)
    direction[:GROUP, last] = (codes[:GROUP, last] - case.params[0][1][last]).double()
    rest = (case.values() - case.W.T - direction * case.params[0][0][last].double()).flatten()
    u = direction.flatten()
    best = -(u @ case.kronecker @ rest) / (u @ case.kronecker @ u)
    torch.testing.assert_close(case.params[0][0][last].double(), best, rtol=3 * HALF_ULP, atol=0)


@pytest.mark.parametrize("turned", [1, 32])
@pytest.mark.parametrize("grid", [*GRIDS, *(BLOCK_GRIDS[n] for n in ("Q4_0", "Q2_K", "Q3_K", "IQ4_NL"))], ids=str)
def test_no_step_raises_the_loss(grid, turned, monkeypatch):
    """Up to fp32 sums: a few 2**-22 of what zeros would lose."""
    monkeypatch.setattr(coupled, "TURNED", turned)
    span = GROUP if isinstance(grid, AffineGrid) else grid.span
    case = Case(grid, 3, outputs=40, inputs=2 * span if span > 32 else 64, group=span)
    case.kronecker = None
    loss = lambda: float(coupled_loss(case.values() - case.W.T, case.H, case.HO).sum())  # noqa: E731
    slack, first = 2**-20 * float(coupled_loss(case.W.T, case.H, case.HO).sum()), loss()
    last = first
    for round_ in range(2):
        for s in range(len(case.spans)):
            for step in ("refit", "sweep"):
                getattr(case.local(s), step)(grid, case.params[s], torch.Generator().manual_seed(round_))
                assert loss() <= last + slack
                last = loss()
    assert last < 0.9 * first


def test_numbers_that_rounding_spoils_stay():
    """Numbers that only go by whole steps too long to help: none moves, together or by itself."""
    case = Case(GRIDS[2], 2)
    case.refine(rounds=3)
    local, (scale, _) = case.local(0), case.params[0]
    knob, before = next(iter(case.grid.knobs(case.params[0], local.codes, local.span.step))), scale.clone()
    coarse = replace(knob, storable=lambda real: torch.where(real < 1e9, 3 * before, real))
    local._turn(coarse, torch.Generator().manual_seed(0))
    assert torch.equal(scale, before)


def test_stored_numbers_turn_in_every_second_round(monkeypatch):
    """Codes turn in every round, and every span has its turn."""
    taken = []
    for step in ("refit", "sweep"):
        monkeypatch.setattr(coupled._Coupled, step, lambda local, *_, step=step: taken.append((step, local.span)))
    case = Case(GRIDS[2], 2)
    case.refine(rounds=3)
    spans = len(case.spans)
    both, codes, last = taken[: 2 * spans], taken[2 * spans : 3 * spans], taken[3 * spans :]
    assert [step for step, _ in both] == ["refit", "sweep"] * spans
    assert [step for step, _ in codes] == ["sweep"] * spans
    assert [step for step, _ in last] == ["refit", "sweep"] * spans
    for of_round in (both[::2], both[1::2], codes):
        assert sorted(span.columns.start for _, span in of_round) == [span.columns.start for span in case.spans]


def test_factors_made_once_follow_what_turns(monkeypatch):
    """Copies in place of the matrices, as bf16 products have them: the same result."""
    found = []
    for make in (lambda matrix: matrix, lambda matrix: matrix.clone()):
        monkeypatch.setattr(coupled, "factor", make)
        case = Case(GRIDS[2], 3)
        case.refine(rounds=3)
        found.append(case.codes)
    assert torch.equal(*found)


def test_the_loss_is_that_of_the_kronecker_product():
    case = Case(GRIDS[2])
    D = case.values() - case.W.T
    assert float(coupled_loss(D, case.H, case.HO).sum()) == pytest.approx(case.loss(), rel=1e-10)


def test_normalised():
    HO = torch.diag(torch.tensor([1.0, 3.0]))
    assert torch.equal(normalised(HO), torch.diag(torch.tensor([0.5, 1.5]) + FISHER_DAMP))
    assert torch.equal(normalised(torch.zeros(2, 2)), torch.eye(2)), "no gradient arrived: rows are independent"


def stage(coupling=True, rows=None, **options):
    """A stage of two linears, in runs of 64 and 36 outputs if they are coupled."""
    W, _, H = correlated(0, 100, 64)
    _, _, HO = correlated(1, 2, 100)
    outputs = [HO[:64, :64].float(), HO[64:, 64:].float()]
    spec = QuantSpec(bits=2, group_size=32, refine_rounds=3, **options)
    weights = [W[:40].float(), W[40:].float()]
    solution = gptq(weights, H.float(), spec, outputs=outputs if coupling else None, seed=1, rows=rows)
    return W, damped(H, spec.damp_percent), outputs, solution


@pytest.mark.parametrize("options", [{}, {"column_order": "natural"}, {"desc_act": True}, {"sym": False}])
def test_a_stage_loses_less_than_rows_by_themselves(options):
    W, H, outputs, solution = stage(**options)
    *_, alone = stage(coupling=False, **options)
    for rows, HO in ((slice(0, 64), outputs[0]), (slice(64, 100), outputs[1])):
        lost = [
            float(coupled_loss((s.quantized.dequantize().double() - W)[rows].T, H, normalised(HO).double()).sum())
            for s in (solution, alone)
        ]
        assert lost[0] < 0.9 * lost[1]
    D = solution.quantized.dequantize().double() - W
    torch.testing.assert_close(solution.loss.double(), ((D @ H) * D).sum(1), rtol=0.15, atol=0)


def test_runs_are_solved_alike_by_any_number_of_threads(monkeypatch):
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(ptq.quantizers.gptq, "threads_of", lambda device, threads=threads: threads)
        found.append(stage()[3])
    torch.set_num_threads(1)
    assert torch.equal(found[0].quantized.codes, found[1].quantized.codes)
    assert torch.equal(found[0].quantized.scale, found[1].quantized.scale)


def test_ranks_solve_whole_runs():
    whole, *parts = (stage(rows=rows)[3] for rows in (None, slice(0, 64), slice(64, 100)))
    for name in ("codes", "scale", "zero"):
        assert torch.equal(torch.cat([getattr(part.quantized, name) for part in parts]), getattr(whole.quantized, name))
    gathered = parts[0].gathered(lambda own, dim=0: torch.cat([own, own[:36]], dim))
    assert len(gathered.coupled) == 100 and torch.equal(torch.cat([part.coupled for part in parts]), whole.coupled)


@pytest.mark.parametrize(("size", "shares"), [(1, [(0, 100)]), (2, [(0, 64), (64, 100)]), (3, 3 * [(0, 100)])])
def test_a_run_is_one_ranks_or_each_ranks(size, shares):
    outputs = [torch.eye(64), torch.eye(36)]
    for rank, expected in enumerate(shares):
        ranks = Ranks(rank, size)
        rows, gather = StageSolver(None, None, None, None, ranks=ranks)._own_rows(100, outputs)
        assert (rows.start, rows.stop) == expected
        assert gather == (ALONE if size == 3 else ranks).gather


def test_runs_of_outputs():
    assert coupled_cuts(512, 256) == [slice(0, 512)]
    for outputs, inputs in ((11264, 2048), (2048, 5632), (300, 64), (4096, 11008), (40, 1 << 23)):
        cuts = coupled_cuts(outputs, inputs)
        assert [cut.start for cut in cuts[1:]] == [cut.stop for cut in cuts[:-1]] and cuts[0].start == 0
        sizes = [cut.stop - cut.start for cut in cuts]
        assert cuts[-1].stop == outputs and all(size % ROWS == 0 for size in sizes[:-1])
        assert max(sizes) <= chunks.COUPLED_ROWS and max(sizes) <= max(ROWS, chunks.COUPLED_WEIGHTS // inputs)
        assert max(sizes) - sizes[-1] < ROWS * len(sizes)

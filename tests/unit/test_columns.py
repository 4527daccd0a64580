"""The column solver against a textbook Optimal Brain Surgeon that inverts the remaining Hessian at every column."""

from functools import lru_cache

import pytest
import torch

import ptq.quantizers.columns
from calibration.errors import InputError
from calibration.store import SquareOnDisk
from ptq.grids.affine import AffineGrid
from ptq.quantizers.columns import DAMP_ATTEMPTS, DAMP_GROWTH, damped_factor, quantize_columns

OUTPUTS, INPUTS, GROUP, DAMP = 48, 56, 24, 0.01  # neither 24 nor 32 divides 56: the last group and block are ragged
BLOCKS = 1, 32, 128
GRIDS = [(1, True)] + [(bits, sym) for bits in (2, 3, 4, 8) for sym in (True, False)]
SEEDS = 0, 1
# The solver and the oracle compute the same reals along different routes. Each is off by about
# cond(H) * eps * |w| <= 6e3 * 1e-16 * 1e1 = 6e-12 (the damping bounds cond by INPUTS / DAMP = 5600); 100x headroom.
CLOSE64 = 1e-9


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small run three times slower when threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def correlated(seed, outputs=OUTPUTS, inputs=INPUTS, tokens=400):
    """fp64 weights (O, I), activations (T, I) with a strong low-rank part and uneven columns, and H = 2/n X^T X."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rank = inputs * 3 // 7
    X = (normal(tokens, inputs) + 3 * normal(tokens, rank) @ normal(rank, inputs)) * torch.exp(0.5 * normal(inputs))
    return normal(outputs, inputs), X, 2 / tokens * X.T @ X


def remaining_inverses(H):
    """The literal inverse of what is left of H before each column: no factor, no update formula."""
    return [torch.linalg.inv(H[k:, k:]) for k in range(len(H))]


def nearest_code(w, scale, zero, top):
    """By comparison with every value of the grid: codes (O,), and how much further the second best is, in steps."""
    distance = (scale[:, None] * (torch.arange(top + 1) - zero[:, None]) - w[:, None]).abs()
    best, code = distance.min(1)
    distance[torch.arange(len(w)), code] = torch.inf
    return code.to(w.dtype), (distance.amin(1) - best) / scale.abs()


def surgeon(W, inverses, grid, params):
    """Optimal Brain Surgeon in fp64: round a column, spread its error by the inverse of the remaining Hessian.

    Args:
        W: (O, I) weights in visiting order.
        inverses: remaining_inverses of the damped Hessian in visiting order.
        grid: Only its list of values is used.
        params: Callable (k, remaining (O, I - k)) -> scale (O,), zero (O,).

    Returns:
        codes (O, I); the loss of each output; each output's smallest distance to a tie, in steps of the grid.
    """
    W, (O, I) = W.clone(), W.shape
    codes, loss, margin = torch.empty(O, I, dtype=torch.float64), torch.zeros(O).double(), torch.ones(O).double()
    for k, inverse in enumerate(inverses):
        scale, zero = params(k, W[:, k:].clone())
        codes[:, k], to_tie = nearest_code(W[:, k], scale, zero, grid.top)
        margin = torch.minimum(margin, to_tie)
        error = W[:, k] - scale * (codes[:, k] - zero)
        loss += error**2 / inverse[0, 0]
        W[:, k:] -= (error / inverse[0, 0])[:, None] * inverse[0]
    return codes, loss, margin


def damped(H, damp_percent=DAMP):
    return H + damp_percent * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def visiting_order(H, ordered):
    return H.diagonal().argsort(descending=True) if ordered else torch.arange(len(H))


def static_groups(W, H, grid):
    """scale, zero (G, O), fitted before any column is rounded."""
    fits = [grid.fit(W[:, g : g + GROUP], H.diagonal()[None, g : g + GROUP]) for g in range(0, W.shape[1], GROUP)]
    return torch.stack([scale for scale, _ in fits]), torch.stack([zero for _, zero in fits])


@lru_cache
def prepared(ordered, seed):
    """A problem, the order of its columns, its damped Hessian in natural order, the inverses in visiting order."""
    W, _, H = correlated(seed)
    order, H_damped = visiting_order(H, ordered), damped(H)
    return W, H, order, H_damped, remaining_inverses(H_damped[order][:, order])


@lru_cache
def static_case(bits, sym, ordered, seed):
    """A problem with groups fitted in advance, and the surgeon's answer to it."""
    (W, H, order, H_damped, inverses), grid = prepared(ordered, seed), AffineGrid(bits, sym)
    scale, zero = static_groups(W, H_damped, grid)

    def params(k, _):
        g = int(order[k]) // GROUP
        return scale[g], zero[g]

    answer = surgeon(W[:, order], inverses, grid, params)
    return W, H, order, grid, params, answer


def solve(W, H, order, grid, params, column_block, dtype=torch.float64):
    """quantize_columns on a natural-order problem: codes, D = Q - W (O, I) in visiting order, and the loss."""
    U, _ = damped_factor(H.to(dtype)[order][:, order], DAMP)
    Wt = W.T[order].to(dtype)

    def cast(k, remaining):
        scale, zero = params(k, remaining)
        return scale.to(dtype), zero.to(dtype)

    codes, Q, loss = quantize_columns(Wt.clone(), U, grid, cast, column_block=column_block)
    assert codes.dtype == Q.dtype == loss.dtype == dtype
    return codes.T, (Q - Wt).T, loss


def trace(D, H):
    """Each row's d H d^T."""
    return (D @ H * D).sum(1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ordered", [False, True], ids=["natural", "activation"])
@pytest.mark.parametrize("column_block", BLOCKS)
@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_codes_equal_the_surgeons(bits, sym, ordered, seed, column_block):
    W, H, order, grid, params, (codes, loss, _) = static_case(bits, sym, ordered, seed)
    ours, D, our_loss = solve(W, H, order, grid, params, column_block)
    assert torch.equal(ours, codes)
    torch.testing.assert_close(our_loss, loss, rtol=CLOSE64, atol=0)
    H_damped = damped(H)[order][:, order]
    torch.testing.assert_close(our_loss, trace(D, H_damped), rtol=CLOSE64, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("column_block", BLOCKS)
@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_single_precision(bits, sym, seed, column_block):
    W, H, order, grid, params, (codes, _, margin) = static_case(bits, sym, True, seed)
    ours, D, loss = solve(W, H, order, grid, params, column_block, torch.float32)
    # A target is a sum of INPUTS terms of the size of a weight, at most 2**bits steps, so rounding moves it by up to
    # eps * 2**bits * INPUTS steps. Rows that come closer than that to a tie may differ; most rows do not.
    clear = margin > 2**-23 * 2**bits * INPUTS
    assert clear.double().mean() > 0.6
    assert torch.equal(ours.double()[clear], codes[clear])
    # error_k = target - q is at least a fraction of a step where target is up to 2**bits steps: relative error
    # eps * 2**bits, times a few operations.
    identity = trace(D.double(), damped(H)[order][:, order]).sum()
    torch.testing.assert_close(loss.double().sum(), identity, rtol=max(1e-5, 2**-24 * 2**bits * 16), atol=0)


@lru_cache
def dynamic_case(bits, sym, seed):
    """A problem whose groups are fitted when their first column is reached, and the surgeon's answer to it."""
    (W, H, _, _, inverses), grid = prepared(False, seed), AffineGrid(bits, sym)
    importance = torch.stack([1 / inverse[0, 0] for inverse in inverses])

    def fitting(seen):
        held = {}

        def params(k, remaining):
            seen.append(remaining)
            if k % GROUP == 0:
                columns = remaining[:, :GROUP]
                held["fit"] = grid.fit(columns, importance[None, k : k + columns.shape[1]])
            return held["fit"]

        return params

    seen = []
    codes, loss, _ = surgeon(W, inverses, grid, fitting(seen))
    return W, H, grid, fitting, codes, loss, seen


@pytest.mark.parametrize("seed", SEEDS[:1])
@pytest.mark.parametrize("column_block", BLOCKS)
@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_groups_fitted_on_the_way(bits, sym, seed, column_block):
    W, H, grid, fitting, codes, loss, expected = dynamic_case(bits, sym, seed)
    fit = fitting(compensated := [])

    def params(k, remaining):
        if k % GROUP == 0:  # a request that reaches over the end gets what is there
            torch.testing.assert_close(remaining(GROUP).T, expected[k][:, :GROUP], rtol=0, atol=CLOSE64)
        return fit(k, remaining(INPUTS).T)

    ours, D, our_loss = solve(W, H, torch.arange(INPUTS), grid, params, column_block)
    for k in range(INPUTS):
        torch.testing.assert_close(compensated[k], expected[k], rtol=0, atol=CLOSE64)
    assert torch.equal(ours, codes)
    torch.testing.assert_close(our_loss, loss, rtol=CLOSE64, atol=0)
    torch.testing.assert_close(our_loss, trace(D, damped(H)), rtol=CLOSE64, atol=0)


def paper_loop(W, H, grid, params, column_block, slipped):
    """GPTQ as printed, on the Cholesky factor of the inverse; `slipped` updates columns k:k+end, as mlx-lm did."""
    W, U = W.clone(), torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    codes, Q, loss = torch.empty_like(W), torch.empty_like(W), torch.zeros(len(W), dtype=W.dtype)
    for start in range(0, W.shape[1], column_block):
        end = min(start + column_block, W.shape[1])
        errors = torch.zeros(len(W), end - start, dtype=W.dtype)
        for k in range(start, end):
            scale, zero = params(k, W[:, k:])
            codes[:, k] = grid.encode(W[:, k], scale, zero)
            Q[:, k] = grid.decode(codes[:, k], scale, zero)
            error = (W[:, k] - Q[:, k]) / U[k, k]
            stop = k + end if slipped else end
            W[:, k:stop] -= error[:, None] * U[k, k:stop]
            errors[:, k - start] = error
            loss += error**2
        W[:, end:] -= errors @ U[start:end, end:]
    return codes, Q, loss


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("slipped", [False, True])
def test_a_slipped_column_range_is_noticed(seed, slipped):
    """The oracle and the loss identity both see mlx-lm's slip."""
    W, H, _, grid, params, (codes, _, _) = static_case(4, True, False, seed)
    H_damped = damped(H)
    theirs, Q, loss = paper_loop(W, H_damped, grid, params, 16, slipped)
    wrong = float((theirs != codes).double().mean())
    ratio = float(loss.sum() / trace(Q - W, H_damped).sum())
    if not slipped:
        assert wrong == 0 and abs(ratio - 1) < CLOSE64
        return
    assert 0.2 < wrong < 0.35 and abs(ratio - 1) > 0.2, (wrong, ratio)


def test_the_worked_example():
    """The 2x2 case of the module's docstring, by hand."""
    H, W = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64), torch.tensor([[0.4, 0.4]], dtype=torch.float64)
    U = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    assert torch.equal(U @ U.T, H)
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    codes, Q, loss = quantize_columns(W.T.clone(), U, AffineGrid(2, False), lambda k, _: (one, zero))
    assert codes.T.tolist() == [[0.0, 1.0]] and Q.T.tolist() == [[0.0, 1.0]]
    torch.testing.assert_close(loss, torch.tensor([0.2], dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, INPUTS - 1, INPUTS])
@pytest.mark.parametrize("chunk", [5, 1 << 20])
def test_the_factor_is_of_the_damped_hessian(size, chunk, dtype, monkeypatch):
    monkeypatch.setattr(ptq.quantizers.columns, "TURN_CHUNK", chunk)
    H = correlated(0)[2].to(dtype)[:size, :size].clone()
    before = H.clone()
    U, added = damped_factor(H, DAMP)
    assert added == DAMP and torch.equal(U, U.triu()) and bool((U.diagonal() > 0).all())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(H, damped(before), rtol=4 * eps, atol=0)
    # Backward error of Cholesky: below INPUTS * eps * H's largest diagonal entry (Higham, theorem 10.3).
    bound = INPUTS * eps * float(H.diagonal().max())
    torch.testing.assert_close(U @ U.T, H, rtol=0, atol=bound)


@pytest.mark.parametrize("seed", range(5))
def test_a_hessian_on_disk_has_the_same_factor(tmp_path, seed):
    """A diagonal inside a matrix and one by itself are added up in different orders if nothing is done about it."""
    X = torch.randn(1000, 300, generator=torch.Generator().manual_seed(seed))
    H, order = X.T @ X, torch.randperm(300, generator=torch.Generator().manual_seed(seed))
    expected, _ = damped_factor(H.clone(), 0.9, order)
    U, _ = damped_factor(SquareOnDisk(H, tmp_path / "H.bin"), 0.9, order)
    assert torch.equal(U, expected)


def test_damping_grows_until_the_factor_exists():
    H = correlated(0)[2]
    values, vectors = torch.linalg.eigh(H)
    mean = float(values.mean())
    # Shares of the mean: 0.01, 0.04, 0.16 and 0.64 are tried in turn.
    for lowest, attempts in ((0.0, 1), (-0.015, 2), (-0.1, 3), (-0.5, 4)):
        values[:3] = lowest * mean
        values[3:] *= (INPUTS * mean - 3 * lowest * mean) / values[3:].sum()
        indefinite = (vectors * values) @ vectors.T
        work = indefinite.clone()
        U, added = damped_factor(work, DAMP)
        assert added == pytest.approx(DAMP * DAMP_GROWTH ** (attempts - 1), rel=1e-12)
        torch.testing.assert_close(work, damped(indefinite, added), rtol=0, atol=CLOSE64 * mean)
        torch.testing.assert_close(U @ U.T, work, rtol=0, atol=CLOSE64 * mean)


def test_rank_deficient_in_single_precision():
    _, X, _ = correlated(1, tokens=10)
    H = (2 / 10 * X.T @ X).float()
    assert int(torch.linalg.matrix_rank(H)) <= 10
    _, added = damped_factor(H, DAMP)
    assert added == DAMP


@pytest.mark.parametrize("damage", ["negative", "nan", "inf"])
def test_a_hessian_that_no_damping_mends_is_refused(damage):
    H = correlated(0)[2]
    H[3, 5] = H[5, 3] = {"negative": 1e12, "nan": float("nan"), "inf": float("inf")}[damage]
    most = DAMP * DAMP_GROWTH ** (DAMP_ATTEMPTS - 1)
    with pytest.raises(InputError, match=f"not positive definite even with {most:g} of its mean diagonal"):
        damped_factor(H, DAMP)

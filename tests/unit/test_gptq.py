"""One stage from weights and Hessian to a QuantizedTensor, against fp64 oracles."""

from dataclasses import replace

import pytest
import torch
from test_columns import (  # noqa: F401
    GROUP,
    INPUTS,
    OUTPUTS,
    correlated,
    damped,
    one_thread,
    remaining_inverses,
    surgeon,
    trace,
    visiting_order,
)

import ptq.quantizers.gptq
from calibration.errors import InputError
from calibration.hessian import Hessian
from ptq.grids.affine import AffineGrid
from ptq.quantizers import chunks
from ptq.quantizers.columns import damped_factor
from ptq.quantizers.gptq import gptq, target_shift
from ptq.quantizers.rtn import rtn
from ptq.spec import QuantSpec

SPEC = QuantSpec(bits=2, group_size=GROUP, refine_rounds=0, column_block=32, damp_percent=0.01)
ORDERS = {
    "activation": {"column_order": "activation"},
    "natural": {"column_order": "natural"},
    "desc_act": {"column_order": "activation", "desc_act": True},
}
GRIDS = [(1, True), (1.58, True), (2, True), (2, False), (4, True), (4, False)]
# Losses are fp32 sums of INPUTS**2 products; D is a difference of numbers 2**bits times as large.
LOSS_RTOL = 2**-23 * INPUTS


def spec_of(order="activation", **changes):
    return replace(SPEC, **ORDERS[order], **changes)


def solve(W, H, spec, G=None, **options):
    """Copies of H and G, which gptq() consumes."""
    G = None if G is None else G.to(torch.float32, copy=True)
    return gptq(W.float(), H.to(torch.float32, copy=True), spec, G=G, **options)


def quantization_error(solution, target):
    return solution.quantized.dequantize().double() - target.double()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_codes_are_the_surgeons_on_the_chosen_grids(bits, sym, order):
    W, _, H = correlated(3)
    W, H = W.float().double(), H.float().double()
    spec = spec_of(order, bits=bits, sym=sym)
    solution, grid = solve(W, H, spec), AffineGrid(bits, sym)
    qt, H_damped = solution.quantized, damped(H, solution.damp_percent)
    visited = visiting_order(H, order != "natural")
    remaining = []

    def params(k, left):
        g = int(qt.g_idx[visited[k]])
        remaining.append(left)
        return qt.scale[:, g].double(), qt.zero[:, g].double()

    inverses = remaining_inverses(H_damped[visited][:, visited])
    codes, loss, margin = surgeon(W[:, visited], inverses, grid, params)
    # Rows that come nearer to a tie than fp32 sums of INPUTS terms of up to 2**bits steps may differ; see test_columns.
    clear = margin > 2**-23 * 2**bits * INPUTS
    assert clear.double().mean() > 0.6
    assert torch.equal(qt.codes[:, visited][clear].double(), codes[clear])
    torch.testing.assert_close(solution.loss[clear].double(), loss[clear], rtol=2**bits * LOSS_RTOL, atol=0)
    torch.testing.assert_close(
        solution.loss.double(), trace(quantization_error(solution, W), H_damped), rtol=2**bits * LOSS_RTOL, atol=0
    )
    if order == "activation":
        starts, fitted_on, importance = range(0, INPUTS, GROUP), lambda k: W[:, k : k + GROUP], H_damped.diagonal()
        group_at = dict.fromkeys(starts) | {k: k // GROUP for k in starts}
    else:  # groups are fitted on what the earlier columns' errors have left, each column weighed by its own loss
        importance = torch.stack([1 / inverse[0, 0] for inverse in inverses])
        starts, fitted_on = range(0, INPUTS, GROUP), lambda k: remaining[k][:, :GROUP]
        group_at = {k: int(qt.g_idx[visited[k]]) for k in starts}
    for k in starts:
        w, weight = fitted_on(k), importance[None, k : k + GROUP]
        ours = [p[:, group_at[k]].double() for p in (qt.scale, qt.zero)]
        errors = []
        for scale, zero in (ours, grid.fit(w, weight)):
            scale, zero = scale[:, None], zero[:, None]
            q = grid.decode(grid.encode(w, scale, zero), scale, zero)
            errors.append(((q - w) ** 2 * weight).sum(1))
        # The same search on fp32 numbers: another candidate wins only where the two are this close.
        torch.testing.assert_close(errors[0][clear], errors[1][clear], rtol=1e-3, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_column_block_changes_nothing(order):
    W, _, H = correlated(4)
    first, *others = [solve(W, H, spec_of(order, column_block=block)).quantized for block in (1, 24, 32, 128)]
    for other in others:
        # Sums are split at other places; a row is redone from a near tie on. Measured: no difference.
        assert float((first.codes == other.codes).all(1).double().mean()) > 0.9


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_losses_are_what_they_say(bits, sym, order, monkeypatch):
    monkeypatch.setattr(ptq.quantizers.gptq, "LOSS_TILE", 36)  # several tiles, the last one shorter
    W, _, H = correlated(5)
    spec = spec_of(order, bits=bits, sym=sym, refine_rounds=2)
    solution = solve(W, H, spec)
    H_damped, rtol = damped(H, solution.damp_percent), 2**bits * LOSS_RTOL
    torch.testing.assert_close(
        solution.loss.double(), trace(quantization_error(solution, W), H_damped), rtol=rtol, atol=0
    )
    torch.testing.assert_close(solution.energy.double(), trace(W, H_damped), rtol=LOSS_RTOL, atol=0)
    unrefined = solve(W, H, replace(spec, refine_rounds=0))
    assert torch.equal(unrefined.loss, unrefined.loss_gptq) and torch.equal(unrefined.loss, solution.loss_gptq)
    layout = visiting_order(H, order == "desc_act")
    plain = rtn(W[:, layout].float(), spec).dequantize() - W[:, layout]
    torch.testing.assert_close(solution.loss_rtn.double(), trace(plain, H_damped[layout][:, layout]), rtol=rtol, atol=0)
    assert solution.loss.sum() < 0.95 * solution.loss_gptq.sum() < 0.8 * solution.loss_rtn.sum()
    assert solution.dead == 0 and solution.damp_percent == spec.damp_percent


def test_desc_act_is_the_natural_order_of_shuffled_columns():
    W, _, H = (t.float() for t in correlated(6))
    layout = visiting_order(H, True)
    shuffled = solve(W[:, layout], H[layout][:, layout], spec_of("natural", refine_rounds=1))
    solution = solve(W, H, spec_of("desc_act", refine_rounds=1))
    assert torch.equal(solution.quantized.codes[:, layout], shuffled.quantized.codes)
    assert torch.equal(solution.quantized.scale, shuffled.quantized.scale)
    assert torch.equal(solution.quantized.dequantize()[:, layout], shuffled.quantized.dequantize())


@pytest.mark.parametrize(("group_size", "sizes"), [(GROUP, [24, 24, 8]), (-1, [56]), (14, [14] * 4), (100, [56])])
def test_group_indices(group_size, sizes):
    W, _, H = correlated(7)
    for order in ORDERS:
        qt = solve(W, H, spec_of(order, group_size=group_size)).quantized
        assert qt.g_idx.dtype == torch.int32 and qt.scale.shape == (OUTPUTS, len(sizes))
        assert qt.g_idx.bincount().tolist() == sizes
        if order == "desc_act":  # groups are runs of the activation order: earlier groups have the larger diagonals
            diagonals = [H.diagonal()[qt.g_idx == g] for g in range(len(sizes))]
            for larger, smaller in zip(diagonals, diagonals[1:], strict=False):
                assert larger.min() >= smaller.max()
        else:
            assert torch.equal(qt.g_idx, qt.g_idx.sort().values)


def streams(seed, drift=0.3, tokens=300):
    """W, and fp64 inputs of the same tokens in the quantized and the full-precision stream."""
    W, X_full, _ = correlated(seed, tokens=tokens)
    generator = torch.Generator().manual_seed(seed + 100)
    noise = torch.randn(INPUTS, INPUTS, generator=generator, dtype=torch.float64) / INPUTS**0.5
    return W, X_full + drift * X_full @ noise, X_full


def closed_form(W, X, X_full, damping):
    """argmin over V of 2/n ||X_full W^T - X V^T||^2 + damping ||V - W||^2, as one dense least squares."""
    n, I = X.shape
    ridge = damping**0.5 * torch.eye(I, dtype=X.dtype)
    design = torch.cat([(2 / n) ** 0.5 * X, ridge])
    target = torch.cat([(2 / n) ** 0.5 * X_full @ W.T, ridge @ W.T])
    return torch.linalg.lstsq(design, target, driver="gelsd").solution.T


def test_target_shift_is_the_least_squares_solution():
    W, X, X_full = streams(8)
    n = len(X)
    H, G = 2 / n * X.T @ X, 2 / n * X_full.T @ X
    damping, mismatch = 0.01 * float(H.diagonal().mean()), W @ (G - H)
    U, _ = damped_factor(H, 0.01)
    expected = closed_form(W, X, X_full, damping)
    assert float((expected - W).norm() / W.norm()) > 0.05
    # fp64 on both sides, cond(design)**2 <= INPUTS / 0.01: 1e4 * 1e-16, with room.
    torch.testing.assert_close(W + target_shift(mismatch, U), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("correction", [0.0, 0.5, 1.0])
def test_the_corrected_target_is_what_is_quantized(order, correction):
    W, X, X_full = streams(9)
    hessian = Hessian(INPUTS, cross=True)
    hessian.add(X, X_full)
    H, G = hessian.finalise()
    damping = 0.01 * float(H.double().diagonal().mean())
    target = W + correction * (closed_form(W, X, X_full, damping) - W)
    solution = solve(W, H, spec_of(order, bits=8, correction=correction, refine_rounds=1), G)
    H_damped = damped(H.double(), 0.01)
    # H and G are fp32 sums: the shift is off by cond * 2**-24 = 6e3 * 6e-8 of itself at most.
    torch.testing.assert_close(solution.energy.double(), trace(target, H_damped), rtol=4e-4, atol=0)
    errors = [
        float(trace(quantization_error(solution, other), H_damped).sum()) for other in (target, W, 2 * target - W)
    ]
    if correction:  # 8 bits resolve the shift: the result is around the target, not around W or past the target
        assert errors[0] < 0.01 * min(errors[1:])
        # The point of it: outputs on the quantized stream come closer to the full-precision stream's.
        before, after = (
            float((X @ V.T.double() - X_full @ W.T).square().sum())
            for V in (
                solve(W, H, spec_of(order, bits=8)).quantized.dequantize(),
                solution.quantized.dequantize(),
            )
        )
        assert after < (0.5 if correction == 1 else 0.8) * before
    else:
        plain = solve(W, H, spec_of(order, bits=8, refine_rounds=1))
        assert torch.equal(plain.quantized.codes, solution.quantized.codes)


@pytest.mark.parametrize("order", ORDERS)
def test_stacked_linears_are_solved_as_if_alone(order):
    W, X, X_full = streams(10)
    hessian = Hessian(INPUTS, cross=True)
    hessian.add(X, X_full)
    H, G = hessian.finalise()
    spec = spec_of(order, refine_rounds=2)
    stacked = solve(W, H, spec, G, seed=3)
    for rows in (slice(0, 7), slice(7, 40), slice(40, OUTPUTS)):
        alone = solve(W[rows], H, spec, G, seed=3)
        part = stacked.quantized.rows(rows)
        # Matrix products of other shapes may round otherwise, and a row goes another way from a near tie on:
        # 1e-6 steps of doubt on 56 columns and two sweeps touch one row in several thousand.
        same = (part.codes == alone.quantized.codes).all(1)
        assert float(same.double().mean()) > 0.9
        assert torch.equal(part.g_idx, alone.quantized.g_idx)
        torch.testing.assert_close(part.scale[same], alone.quantized.scale[same], rtol=2**-9, atol=0)
        torch.testing.assert_close(stacked.loss[rows][same], alone.loss[same], rtol=1e-3, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_rows_in_chunks(order, monkeypatch):
    """A list of matrices is their stack, and rows are worked on a few at a time wherever matrices begin and end."""
    W, X, X_full = streams(10)
    H, G = 2 / len(X) * X.T @ X, 2 / len(X) * X_full.T @ X
    spec, before = spec_of(order, refine_rounds=2), W.clone()
    whole = solve(W, H, spec, G, seed=3)
    parts = [W[:7].float(), W[7:40].half().float().bfloat16(), W[40:].float()]
    stacked = torch.cat([part.float() for part in parts])
    listed = gptq(parts, H.float(), spec, G=G.float(), seed=3)
    assert torch.equal(listed.quantized.codes, solve(stacked, H, spec, G, seed=3).quantized.codes)
    for rows in (10, OUTPUTS - 1):
        monkeypatch.setattr(chunks, "CHUNK", rows * INPUTS + INPUTS // 2)
        chunked = gptq([W[:7].float(), W[7:40].float(), W[40:].float()], H.float(), spec, G=G.float(), seed=3)
        same = (chunked.quantized.codes == whole.quantized.codes).all(1)
        assert chunked.quantized.codes.shape == W.shape and float(same.double().mean()) > 0.9  # see above
        for name in ("loss", "loss_gptq", "loss_rtn", "energy"):
            ours, theirs = getattr(chunked, name), getattr(whole, name)
            torch.testing.assert_close(ours[same], theirs[same], rtol=1e-3, atol=0)
    assert torch.equal(W, before)


@pytest.mark.parametrize("order", ORDERS)
def test_threads_change_no_bit(order, monkeypatch):
    _, X, X_full = streams(10)
    H, G = 2 / len(X) * X.T @ X, 2 / len(X) * X_full.T @ X
    W = torch.randn(5 * chunks.ROWS, INPUTS, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(chunks, "CHUNK", chunks.ROWS * INPUTS)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(ptq.quantizers.gptq, "threads_of", lambda device, threads=threads: threads)
        found.append(gptq(W, H.float(), spec_of(order, refine_rounds=2), G=G.float(), seed=3))
    torch.set_num_threads(1)
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(found[0].quantized, name), getattr(found[1].quantized, name))
    assert torch.equal(found[0].loss, found[1].loss)


@pytest.mark.parametrize("runs", [None, (64, 46)])
@pytest.mark.parametrize("order", ORDERS)
def test_rows_of_a_stage_and_matrices_on_disk_change_no_bit(order, runs, tmp_path, monkeypatch):
    """What several ranks solve and gather, and what --max-memory does, is what one process does."""
    _, X, X_full = streams(10)
    H, G = 2 / len(X) * X.T @ X, 2 / len(X) * X_full.T @ X
    weights = [torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(rows)) for rows in (40, 70)]
    spec = spec_of(order, refine_rounds=2)
    g = torch.randn(200, 64, generator=torch.Generator().manual_seed(2))
    outputs = runs and [g[:, :run].T @ g[:, :run] for run in runs]
    given = lambda: dict(G=G.float(), seed=3, outputs=outputs)  # noqa: E731
    whole = gptq(weights, H.float(), spec, **given())
    cuts = ((0, 64), (64, 110)) if runs else ((0, 32), (32, 64), (64, 110))
    parts = [gptq(weights, H.float(), spec, rows=slice(*cut), **given()) for cut in cuts]
    monkeypatch.setattr(ptq.quantizers.gptq, "LARGE", 0)
    spilled = gptq(weights, H.float(), spec, spill=tmp_path, **given())
    for name in ("codes", "scale", "zero"):
        expected = getattr(whole.quantized, name)
        assert torch.equal(torch.cat([getattr(part.quantized, name) for part in parts]), expected)
        assert torch.equal(getattr(spilled.quantized, name), expected)
    assert torch.equal(torch.cat([part.loss for part in parts]), whole.loss) and torch.equal(spilled.loss, whole.loss)
    for name in ("loss_gptq", "loss_rtn", "energy"):
        assert torch.equal(getattr(spilled, name), getattr(whole, name))
    assert [file.stat().st_size for file in sorted(tmp_path.iterdir())] == [4 * INPUTS * INPUTS] * 2


@pytest.mark.parametrize("order", ORDERS)
def test_the_mismatch_of_few_outputs_stands_in_for_that_of_all_inputs(order, monkeypatch):
    """W (G - H) in place of G: the same target, for some rows too and however many rows a chunk has."""
    W, X, X_full = streams(10)
    H, G = 2 / len(X) * X.T @ X, 2 / len(X) * X_full.T @ X
    weights, WG = [W[:40].float(), W[40:].float()], (W @ (G - H)).float()
    spec = spec_of(order, refine_rounds=0)
    expected = gptq(weights, H.float(), spec, G=G.float())
    assert not torch.equal(expected.quantized.codes, gptq(weights, H.float(), spec).quantized.codes)
    for chunk in (1 << 20, 32 * INPUTS):
        monkeypatch.setattr(chunks, "CHUNK", chunk)
        for rows in (slice(0, OUTPUTS), slice(32, OUTPUTS)):
            given = WG.clone()
            found = gptq(weights, H.float(), spec, WG=given, rows=rows)
            assert given.numel() == 0
            same = (found.quantized.codes == expected.quantized.codes[rows]).all(1)
            assert float(same.double().mean()) > 0.9  # see above
            torch.testing.assert_close(found.energy, expected.energy[rows], rtol=1e-3, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_dead_inputs(bits, sym, order):
    W, X, X_full = streams(11)
    dead = torch.tensor([0, 5, 23, 24, 55])
    X[:, dead] = 0  # in the quantized stream only: the cross term still has their rows
    hessian = Hessian(INPUTS, cross=True)
    hessian.add(X, X_full)
    H, G = hessian.finalise()
    solution = solve(W, H, spec_of(order, bits=bits, sym=sym), G)
    assert solution.dead == pytest.approx(len(dead) / INPUTS)
    qt = solution.quantized
    assert bool(torch.isfinite(qt.dequantize()).all()) and bool(torch.isfinite(solution.loss).all())
    g = qt.g_idx[dead].long()
    nearest = AffineGrid(bits, sym).encode(W[:, dead].float(), qt.scale[:, g], qt.zero[:, g])
    # The target of a dead input is its weight: neither correction nor other columns' errors reach it.
    assert torch.equal(qt.codes[:, dead].float(), nearest)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rounds", [0, 2])
def test_all_inputs_dead(order, rounds):
    W = correlated(12)[0]
    solution = solve(W, torch.zeros(INPUTS, INPUTS), spec_of(order, refine_rounds=rounds))
    assert solution.dead == 1.0 and solution.damp_percent == SPEC.damp_percent
    qt = solution.quantized
    error = (qt.dequantize() - W).square().sum(1)
    torch.testing.assert_close(solution.loss.double(), SPEC.damp_percent * error, rtol=2**qt.bits * LOSS_RTOL, atol=0)
    plain = rtn(W.float(), SPEC).dequantize() - W
    assert error.sum() < 0.8 * plain.square().sum()
    if rounds == 0:
        g = qt.g_idx.long()
        assert torch.equal(qt.codes.float(), AffineGrid(2, True).encode(W.float(), qt.scale[:, g], qt.zero[:, g]))


def test_rank_deficient_and_indefinite_hessians_are_damped_and_reported():
    W, X, _ = correlated(13, tokens=12)
    few = solve(W, 2 / 12 * X.T @ X, SPEC)
    assert few.damp_percent == SPEC.damp_percent and bool(torch.isfinite(few.loss).all())
    values, vectors = torch.linalg.eigh(correlated(13)[2])
    values[:2] = -0.1 * values.mean()
    H = (vectors * values) @ vectors.T
    solution = solve(W, H, SPEC)
    # 0.01 and 0.04 of the mean diagonal do not lift -0.1 (a little less than the mean now) above 0; 0.16 does.
    assert solution.damp_percent == pytest.approx(0.16)
    H_damped = damped(H, 0.16)
    torch.testing.assert_close(
        solution.loss.double(), trace(quantization_error(solution, W), H_damped), rtol=4 * LOSS_RTOL, atol=0
    )
    assert solution.loss.sum() < solution.loss_rtn.sum()


def test_a_damaged_hessian_is_refused():
    W, _, H = correlated(14)
    H[2, 3] = H[3, 2] = torch.nan
    with pytest.raises(InputError, match="not positive definite"):
        solve(W, H, SPEC)


def test_seed_decides_the_sweeps():
    W, _, H = correlated(15)
    spec = spec_of(refine_rounds=2)
    first, again, other = (solve(W, H, spec, seed=seed).quantized.codes for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_weights_too_large_for_fp16_scales_are_refused_or_clamped(method):
    W, _, H = correlated(16)
    try:
        qt = solve(1e6 * W, H, SPEC).quantized if method == "gptq" else rtn(1e6 * W.float(), SPEC)
    except InputError:
        return
    assert bool(torch.isfinite(qt.dequantize()).all())


@pytest.mark.parametrize(("bits", "sym"), GRIDS)
@pytest.mark.parametrize("size", [1e-6, 1e-9, 0.0])
def test_tiny_and_zero_weights(bits, sym, size):
    W, _, H = correlated(17)
    W = W * size
    W[3] = 0
    solution = solve(W, H, spec_of(bits=bits, sym=sym, refine_rounds=2))
    values = solution.quantized.dequantize()
    assert bool(torch.isfinite(values).all()) and bool(torch.isfinite(solution.loss).all())
    assert bool((values[3] == 0).all())
    if bits > 1:
        assert bool((solution.loss <= solution.energy * (1 + LOSS_RTOL)).all())

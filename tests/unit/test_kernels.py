"""The compiled column loops against the loops of torch operators they stand for."""

import pytest
import torch
from test_columns import GROUP, INPUTS, correlated, damped, one_thread  # noqa: F401

import ptq.quantizers.columns
import ptq.quantizers.refine
from ptq.grids.affine import TERNARY, AffineGrid
from ptq.grids.blocks import BLOCK_GRIDS
from ptq.quantizers.columns import FixedParams, damped_factor, quantize_columns
from ptq.quantizers.refine import refine
from ptq.quantizers.spans import cut_spans, fit_spans

AFFINE = [AffineGrid(bits, sym) for bits, sym in ((1, True), (TERNARY, True), (2, True), (3, False), (8, False))]
BLOCKS = [BLOCK_GRIDS[name] for name in ("Q4_0", "Q4_1", "IQ4_NL", "Q2_0", "Q1_0", "Q2_K", "Q3_K", "IQ4_XS")]
WIDE = 512


def problem(grid, outputs):
    """Wt, U, H and fitted spans in natural order."""
    inputs, span = (INPUTS, GROUP) if isinstance(grid, AffineGrid) else (WIDE, grid.span)
    W, _, H = correlated(3, outputs=outputs, inputs=inputs, tokens=3 * inputs)
    H = damped(H).float()
    U, _ = damped_factor(H, 0.01)
    spans = cut_spans(inputs, span, grid.columns_per_step(span))
    return W.float(), H, U, spans, fit_spans(W.float(), span, grid.fit, H.diagonal())


def both(monkeypatch, run):
    """What the compiled loop gives, and what operators give."""
    compiled = run()
    for module in (ptq.quantizers.columns, ptq.quantizers.refine):
        monkeypatch.setattr(module, "compiled", lambda tensor: False)
    return compiled, run()


def mostly_equal(ours, theirs, share=0.97):
    """Fused multiplications round otherwise: a row goes another way from a near tie on, few rows come to one."""
    same = (ours == theirs).all(0)
    assert float(same.double().mean()) >= share
    return same


@pytest.mark.parametrize("outputs", [1, 63, 64, 200])
@pytest.mark.parametrize("grid", AFFINE + BLOCKS, ids=lambda grid: getattr(grid, "name", str(grid)))
@pytest.mark.parametrize("threads", [1, 3])
def test_rounding(monkeypatch, grid, outputs, threads):
    W, _, U, spans, params = problem(grid, outputs)
    scale, zero = (torch.cat(p) for p in zip(*map(grid.steps, params), strict=True))
    per_span = len(scale) // len(params)
    step = [s * per_span + i for s, span in enumerate(spans) for i in span.step]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    ours, theirs = both(
        monkeypatch,
        lambda: quantize_columns(W.T.contiguous(), U, grid, FixedParams(scale, zero, step), column_block=32),
    )
    same = mostly_equal(ours[0], theirs[0], 0.9 if outputs > 1 else 0)
    torch.testing.assert_close(ours[1][:, same], theirs[1][:, same], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours[2].sum(), theirs[2].sum(), rtol=2e-2 if outputs > 1 else 0.3, atol=0)


@pytest.mark.parametrize("grid", AFFINE + BLOCKS, ids=lambda grid: getattr(grid, "name", str(grid)))
@pytest.mark.parametrize("block", [16, 256])
def test_sweeps(monkeypatch, grid, block):
    W, H, _, spans, params = problem(grid, 100)
    monkeypatch.setattr(ptq.quantizers.refine, "COMPILED_BLOCK", block)

    def run():
        numbers = [tuple(p.clone() for p in of_span) for of_span in params]
        codes = torch.zeros(W.shape[1], len(W))
        generator = torch.Generator().manual_seed(1)
        gained = refine(W.T.contiguous(), H, codes, spans, numbers, grid, rounds=1, generator=generator)
        return codes, gained.sum()

    ours, theirs = both(monkeypatch, run)
    mostly_equal(ours[0], theirs[0], 0.8)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-2, atol=0)

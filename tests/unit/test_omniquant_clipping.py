"""Learnable weight clipping against plain rounding, autograd through textbook operators, and finite differences."""

import pytest
import torch

from ptq.grids.affine import AffineGrid, half_exact
from ptq.quantizers.omniquant import rounding
from ptq.quantizers.omniquant.clipping import START, Clipping, Groups
from ptq.quantizers.omniquant.rounding import Rounded
from ptq.quantizers.rtn import rtn
from ptq.spec import QuantSpec


def weight(O=12, I=96, seed=0):
    W = torch.randn(O, I, generator=torch.Generator().manual_seed(seed))
    W[0, :32] = 0  # a group of zeros
    W[1, :32] = W[1, :32].abs() + 0.5  # groups on one side of zero
    W[2, :32] = -W[2, :32].abs() - 0.5
    return W


def clipping_of(W, bits, sym, width):
    cut = {"linear": Groups.of(W, width)}
    return Clipping(cut, AffineGrid(bits, sym)), cut


@pytest.mark.parametrize("group", [32, 64, -1])  # 64: the last group of a row is shorter
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_full_clip_is_plain_rounding(bits, sym, group):
    W = weight()
    spec = QuantSpec(bits=bits, group_size=group, sym=sym)
    clipping, cut = clipping_of(W, bits, sym, spec.columns_per_group(96))
    with torch.no_grad():
        clipping.logits.fill_(torch.inf)
    ours, plain = clipping.materialise(cut, group)["linear"], rtn(W, spec)
    assert torch.equal(ours.dequantize(), plain.dequantize()) and torch.equal(ours.g_idx, plain.g_idx)
    used = (cut["linear"].high > cut["linear"].low).squeeze(-1)  # any scale holds a group of zeros
    assert torch.equal(ours.scale[used], plain.scale[used]) and torch.equal(ours.zero, plain.zero)
    assert torch.equal(ours.codes, plain.codes)


def test_training_sees_what_the_file_holds():
    W = weight()
    clipping, cut = clipping_of(W, 3, False, 64)
    with torch.no_grad():
        clipping.logits.normal_(generator=torch.Generator().manual_seed(1))
    trained, stored = clipping.fake_quantize(cut)["linear"], clipping.materialise(cut, 64)["linear"]
    assert torch.equal(trained, stored.dequantize())
    assert torch.equal(stored.scale, half_exact(stored.scale))


def textbook(W, logits, bits, width):
    """OmniQuant's equation 2 in plain operators; rounding and fp16 passed straight through, the zero point constant."""
    groups = W.reshape(len(W), -1, width)
    high = torch.sigmoid(logits[0]) * groups.amax(-1, keepdim=True).clamp(min=0)
    low = torch.sigmoid(logits[1]) * groups.amin(-1, keepdim=True).clamp(max=0)
    scale = (high - low) / (2**bits - 1)
    scale = scale + (half_exact(scale) - scale).detach()
    zero = (-low / scale).round().detach()
    ratio = groups / scale
    codes = (ratio + (ratio.round() - ratio).detach() + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).reshape(W.shape)


@pytest.mark.parametrize("learn_weight", [False, True])
def test_gradients_are_those_of_the_equation(learn_weight):
    W = weight()[3:].requires_grad_(learn_weight)
    clipping, cut = clipping_of(W, 2, False, 32)
    with torch.no_grad():
        clipping.logits.normal_(generator=torch.Generator().manual_seed(1))
    logits = clipping.logits.detach().view(2, *cut["linear"].low.shape).requires_grad_()
    expected = textbook(W, logits, 2, 32)
    inputs = [logits, W] if learn_weight else [logits]
    toward = torch.randn(W.shape, generator=torch.Generator().manual_seed(2))
    theirs = torch.autograd.grad((expected * toward).sum(), inputs)
    values = clipping.fake_quantize(cut)["linear"]
    ours = torch.autograd.grad((values * toward).sum(), [clipping.logits, *inputs[1:]])
    # The same sums in another order: 32 terms of size one, 32 * 2^-24 = 2e-6 of the largest.
    assert torch.allclose(values, expected, rtol=0, atol=1e-6)
    assert torch.allclose(ours[0].view_as(theirs[0]), theirs[0], rtol=1e-4, atol=1e-5)
    if learn_weight:
        assert torch.allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-5)


def test_every_bound_has_a_gradient():
    W = weight()[3:]
    clipping, cut = clipping_of(W, 2, False, 32)
    (clipping.fake_quantize(cut)["linear"] - W).square().sum().backward()
    assert bool((clipping.logits.grad != 0).all())
    assert torch.equal(clipping.logits, torch.full_like(clipping.logits, START))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_compiled_loop_is_the_operators(threads, monkeypatch):
    """Values bit for bit, and gradients but for the order in which 50 terms are summed; for a GPU the operators do."""
    monkeypatch.setattr(rounding, "LEAST", 50)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(3)
    w, toward = (torch.randn(40, 5, 50, generator=generator) for _ in range(2))
    scale = (0.1 + torch.rand(40, 5, 1, generator=generator)).requires_grad_()
    zero = torch.randint(0, 8, (40, 5, 1), generator=generator).float()
    found = []
    for compiled in (lambda _: False, rounding.compiled):
        monkeypatch.setattr(rounding, "compiled", compiled)
        values = Rounded.apply(w, scale, zero, 7)
        found.append((values.detach(), *torch.autograd.grad(values, scale, toward)))
    (values, slopes), (ours, our_slopes) = found
    assert torch.equal(ours, values)
    size = (values.abs() * toward.abs()).sum(-1, keepdim=True) / scale
    assert bool(((our_slopes - slopes).abs() <= 50 * 2**-24 * size).all())

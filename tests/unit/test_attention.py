"""Attention on a CPU: which way is taken, and that each gives what the textbook says, and its gradients."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import calibration.attention
import calibration.causal
import calibration.processor
from calibration.attention import FASTER, is_faster, use_faster_attention
from calibration.causal import causal_attention
from calibration.processor import has_bf16_units
from calibration.products import bf16_products

AMX = Path("/proc/cpuinfo").exists() and "amx_bf16" in Path("/proc/cpuinfo").read_text()
PLAIN, OURS = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_ATTENTION_FUNCTIONS[FASTER]


def heads(*, B=2, H=6, K=3, T=40, D=16, E=16, seed=1):
    """Queries, keys and values, strided as a block's are: heads of a token lie together."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((H, D), (K, D), (K, E))
    return [torch.randn(B, T, *size, generator=generator).transpose(1, 2).requires_grad_() for size in sizes]


def textbook(query, key, value, scale):
    """(B, T, H, E) by scores, their softmax and a sum over all keys, in fp64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (query, key, value))
    repeated = [x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)]
    later = torch.full(2 * q.shape[2:3], -torch.inf, dtype=torch.float64).triu(1)
    out = (scale * q @ repeated[0].mT + later).softmax(-1) @ repeated[1]
    return (q, k, v), out.transpose(1, 2)


@pytest.mark.parametrize("room", [3 * 2 * 64 * 64, 1])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"T": 1},
        {"T": 64},
        {"T": 150, "B": 1},
        {"K": 6, "E": 24},
        {"K": 1, "D": 32},
        {"T": 130, "H": 8, "K": 8},
    ],
)
def test_causal_attention_and_its_gradients(shape, kept, room, monkeypatch):
    """Pieces that end within a row, some heads at once and fewer of them at the end, or one at a time."""
    monkeypatch.setattr(calibration.causal, "ROOM", room)
    monkeypatch.setattr(calibration.causal, "KEPT", 1 << 24 if kept else 0)
    factors = heads(**shape)
    exact, wanted = textbook(*factors, 0.3)
    found = causal_attention(*factors, 0.3, trained=True)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    slopes = torch.autograd.grad(wanted, exact, weights.double())
    for again in (True, False):
        for slope, right in zip(torch.autograd.grad(found, factors, weights, again), slopes, strict=True):
            # sums of at most 150 products of sums of at most 150 terms, all of order 1: 300 * 2^-24 = 2e-5
            torch.testing.assert_close(slope.double(), right, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)
    with torch.no_grad():
        assert torch.equal(causal_attention(*factors, 0.3, trained=False), found)


@pytest.mark.parametrize("settings", [{}, {"scaling": 0.5}])
@pytest.mark.parametrize("trained", [True, False])
def test_short_rows_without_a_mask_go_by_pieces(settings, trained, monkeypatch):
    taken = []
    monkeypatch.setattr(
        calibration.attention, "causal_attention", lambda *a, **k: taken.append(k) or causal_attention(*a, **k)
    )
    module, factors = SimpleNamespace(is_causal=True, num_key_value_groups=2), heads()
    plain, _ = PLAIN(module, *factors, None, **settings)
    with torch.set_grad_enabled(trained):
        found, _ = OURS(module, *factors, None, **settings)
    assert taken == [{"trained": trained}] and found.is_contiguous()
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def bias(T):
    return torch.randn(1, 1, T, T, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "shape, mask, causal, settings",
    [
        ({"T": 768, "B": 1, "H": 1, "K": 1}, None, True, {}),
        ({}, bias(40), True, {}),
        ({}, None, False, {}),
        ({}, None, True, {"is_causal": False}),
        ({}, None, True, {"position_bias": bias(40)}),
    ],
)
def test_what_is_not_short_or_not_plain_is_left_to_torch(shape, mask, causal, settings, monkeypatch):
    monkeypatch.setattr(calibration.attention, "causal_attention", None)
    factors = heads(**shape)
    module = SimpleNamespace(is_causal=causal, num_key_value_groups=factors[0].shape[1] // factors[1].shape[1])
    found, _ = OURS(module, *factors, mask, **settings)
    assert torch.equal(found, PLAIN(module, *factors, mask, **settings)[0])


def test_a_query_after_its_keys_is_left_to_torch(monkeypatch):
    """One token that goes on with a text, and what transformers itself refuses."""
    monkeypatch.setattr(calibration.attention, "causal_attention", None)
    module, (query, key, value) = SimpleNamespace(is_causal=True, num_key_value_groups=2), heads()
    found, _ = OURS(module, query[:, :, -1:], key, value, None)
    with pytest.raises(ValueError, match="softcap"):
        OURS(module, query, key, value, None, softcap=50.0)
    assert torch.equal(found, PLAIN(module, query[:, :, -1:], key, value, None)[0])


@pytest.mark.skipif(not has_bf16_units(), reason="this processor has no instructions for bf16")
@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_under_bf16_products(masked, amx, monkeypatch):
    """Where gradients are asked for, and without AMX, it and they are those of fp32, as often as they are asked for.

    With AMX otherwise it is exact attention of bf16 factors, but for its weights, which are rounded once more, by 2**-9
    at most, on their way into the second product, and for what the kernel gives, which is rounded too. (What that way
    gives does not depend on there being AMX; without it, it is slower.)
    """
    if AMX and not amx:
        pytest.skip("with AMX fp32 products are of bf16 factors")
    monkeypatch.setattr(calibration.processor, "_flags", lambda: "avx512_bf16" + " amx_bf16" * amx)
    factors = heads(H=3)
    module = SimpleNamespace(is_causal=not masked)
    mask = torch.full((40, 40), -torch.inf).triu(1)[None, None] if masked else None
    (q, k, v), _ = textbook(*(x.bfloat16() for x in factors), 1)
    p = (q @ k.mT / 4 + torch.full((40, 40), -torch.inf, dtype=torch.float64).triu(1)).softmax(-1)
    exact, bound = (p @ v).transpose(1, 2), 3 * 2**-9 * (p @ v.abs()).transpose(1, 2)
    plain, _ = PLAIN(module, *factors, mask)
    # two sums of 40 fp32 terms differ by 2 * 40 * 2**-24 of them at most; gradients are sums of such sums
    near = partial(torch.allclose, rtol=1e-5, atol=1e-5)
    same = torch.equal if amx and masked else near  # torch's kernel, by the same library
    weights = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2))
    slopes = torch.autograd.grad(plain, factors, weights)
    with bf16_products(True):
        with torch.no_grad():
            found, _ = OURS(module, *factors, mask)
        trained, _ = OURS(module, *factors, mask)
        assert same(trained, plain)
        for again in (True, False):
            assert all(map(same, torch.autograd.grad(trained, factors, weights, again), slopes))
    assert found.dtype == torch.float32 and near(found, plain) != amx
    assert not amx or bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.skipif(not has_bf16_units(), reason="this processor has no instructions for bf16")
def test_with_amx_pieces_are_those_of_fp32(monkeypatch):
    monkeypatch.setattr(calibration.processor, "_flags", lambda: "avx512_bf16 amx_bf16")
    factors, found = heads(), []
    for wanted in (False, True):
        with bf16_products(wanted):
            out = causal_attention(*factors, 0.3, trained=True)
            found.append((out, *torch.autograd.grad(out, factors, torch.ones_like(out))))
    assert all(map(torch.equal, *found))


def test_a_model_gives_the_same_by_it(tiny):
    """Logits of padded rows among them, whose masks transformers then makes."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    tokens, seen = torch.arange(40).view(2, 20) % 32, torch.ones(2, 20, dtype=torch.long)
    seen[1, :5] = 0
    plain = [model(tokens, attention_mask=mask).logits for mask in (None, seen)]
    use_faster_attention(model)
    found = [model(tokens, attention_mask=mask).logits for mask in (None, seen)]
    assert is_faster(model.config)
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_attention_that_transformers_does_not_fuse_stays(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), attn_implementation="eager")
    use_faster_attention(model)
    assert model.config._attn_implementation == "eager"

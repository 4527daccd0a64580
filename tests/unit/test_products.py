"""Products in bf16 units: how far off they are, and when they are chosen."""

import weakref
from pathlib import Path

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import calibration.products
import ptq.defaults
from calibration.processor import has_bf16_units
from calibration.products import bf16_products, rounded_linears, rounded_products, rounding_once
from ptq.defaults import choose_products

CPU, GPU = torch.device("cpu"), torch.device("cuda")
AMX = Path("/proc/cpuinfo").exists() and "amx_bf16" in Path("/proc/cpuinfo").read_text()


def factors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((96, 256), (256, 64))]


def test_not_wanted_is_fp32():
    A, B = factors()
    expected = A @ B
    with bf16_products(False):
        assert torch.equal(A @ B, expected)


@pytest.mark.skipif(not has_bf16_units(), reason="this processor has no instructions for bf16")
def test_factors_are_rounded_and_sums_are_not():
    """Or not even factors, without AMX."""
    A, B = factors()
    plain, exact = A @ B, A.double() @ B.double()
    with bf16_products(True):
        found = A @ B
        with bf16_products(False):  # what is not wanted changes nothing
            assert torch.equal(A @ B, found)
    multiplied = A.bfloat16().double() @ B.bfloat16().double() if AMX else exact
    scale = A.double().abs() @ B.double().abs()
    # each factor is off by 2**-9 of itself at most; sums of 256 exact products in fp32 by 256 * 2**-24 of their terms
    assert bool(((found.double() - exact).abs() <= 2 * 2**-9 * 1.01 * scale).all())
    assert bool(((found.double() - multiplied).abs() <= 256 * 2**-24 * scale).all())
    assert not (AMX and torch.equal(found, plain)) and torch.equal(A @ B, plain)  # and the switch is back


def test_the_switch_is_back_after_an_error():
    A, B = factors()
    plain = A @ B
    with pytest.raises(ZeroDivisionError), bf16_products(True):
        1 / 0  # noqa: B018
    assert torch.equal(A @ B, plain)


@pytest.mark.parametrize(
    "flags, units, products",
    [
        ("avx2", False, "linears and Hessians in bf16"),
        ("avx512_bf16", True, "linears and Hessians in bf16"),
        ("avx512_bf16 amx_bf16", True, "bf16, as are linears"),
    ],
)
def test_what_a_processor_rounds_has_a_name_for_a_runs_identity(flags, units, products, monkeypatch):
    monkeypatch.setattr(calibration.processor, "_flags", lambda: flags)
    assert (has_bf16_units(), rounded_products()) == (units, products)


@pytest.mark.parametrize("units", [True, False])
def test_only_where_the_user_is_silent(units, monkeypatch):
    monkeypatch.setattr(ptq.defaults, "has_bf16_units", lambda: units)
    assert choose_products("auto", CPU) == units
    assert not any(choose_products(name, CPU) for name in ("float32", "bfloat16", "float16"))
    assert not choose_products("auto", GPU)


@pytest.mark.skipif(not has_bf16_units(), reason="this processor has no instructions for bf16")
@pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
@pytest.mark.parametrize("large", [0, 1 << 25])
def test_rounded_linears(kind, large, monkeypatch):
    """Outputs and gradients of rounded factors, each rounded once more: 2^-9 of the largest product of such."""
    monkeypatch.setattr(calibration.products, "LARGE", large)
    monkeypatch.setattr(calibration.products, "AT_ONCE", 1000)  # of 4096
    linear, x = kind(64, 64), torch.randn(5, 64, requires_grad=True)
    W = linear.weight.detach().clone() if kind is Conv1D else linear.weight.detach().T.clone()
    bias = torch.nn.init.normal_(linear.bias).detach().clone()
    with rounded_linears([linear]):
        assert linear.weight.dtype == torch.float32, "not without bf16_products"
    with bf16_products(True), rounded_linears([linear]):
        y = linear(x)
        (found,) = torch.autograd.grad(y, x, torch.ones_like(y))
    rounded = [t.bfloat16().double() for t in (x.detach(), W, bias)]
    wanted = rounded[0] @ rounded[1] + rounded[2]
    assert y.dtype == torch.float32 and linear.weight.dtype == torch.bfloat16
    torch.testing.assert_close(y.detach().double(), wanted, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(found[0].double(), rounded[1].sum(1), rtol=2**-8, atol=1e-5)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x)  # no hook is left


@pytest.mark.skipif(not has_bf16_units(), reason="this processor has no instructions for bf16")
@pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
def test_rounding_once(kind):
    """The same, of a weight that stays and may change, or is in bf16."""
    linear, x = kind(64, 64), torch.randn(5, 64)
    torch.nn.init.normal_(linear.bias)
    plain = linear(x)

    def wanted():
        W = linear.weight if kind is Conv1D else linear.weight.T
        rounded = [t.detach().bfloat16().double() for t in (x, W, linear.bias)]
        return rounded[0] @ rounded[1] + rounded[2]

    with rounding_once([linear]):
        with torch.no_grad():
            assert torch.equal(linear(x), plain), "not without bf16_products"
        with bf16_products(True):
            assert linear(x).requires_grad
            with torch.no_grad():
                for change in (lambda: None, lambda: linear.weight.mul_(3), lambda: None):
                    change()
                    y = linear(x)
                    assert y.dtype == linear.weight.dtype == torch.float32
                    torch.testing.assert_close(y.double(), wanted(), rtol=2**-8, atol=1e-5)
                linear.weight.data = linear.weight.data.bfloat16()
                assert torch.equal(linear(x), y)
    assert "forward" not in vars(linear)


@pytest.mark.skipif(not has_bf16_units(), reason="this processor has no instructions for bf16")
@pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
@pytest.mark.parametrize("frozen", [None, "x", "weight"])
def test_gradients_of_what_rounds_once(kind, frozen):
    """Each is the product of factors of 8 bits, rounded to as many: 2^-8 with the sums' own error."""
    linear, x = kind(64, 48) if kind is torch.nn.Linear else kind(48, 64), torch.randn(2, 5, 64)
    torch.nn.init.normal_(linear.bias)
    x.requires_grad_(frozen != "x")
    linear.weight.requires_grad_(frozen != "weight")
    with rounding_once([linear]), bf16_products(True):
        y = linear(x)
        given = torch.randn_like(y)
        y.backward(given)
    W = linear.weight if kind is Conv1D else linear.weight.T
    of_x, of_W, of_y = (t.detach().bfloat16().double().flatten(0, -2) for t in (x, W, given))
    torch.testing.assert_close(y.double().flatten(0, 1) - linear.bias, of_x @ of_W, rtol=2**-8, atol=1e-4)
    assert (x.grad is None) == (frozen == "x") and (linear.weight.grad is None) == (frozen == "weight")
    if x.grad is not None:
        torch.testing.assert_close(x.grad.double().flatten(0, 1), of_y @ of_W.T, rtol=2**-8, atol=1e-4)
    if linear.weight.grad is not None:
        found = linear.weight.grad if kind is Conv1D else linear.weight.grad.T
        torch.testing.assert_close(found.double(), of_x.T @ of_y, rtol=2**-8, atol=1e-4)
    torch.testing.assert_close(linear.bias.grad, given.flatten(0, 1).sum(0))


@pytest.mark.skipif(not has_bf16_units(), reason="this processor has no instructions for bf16")
def test_weights_are_rounded_once(monkeypatch):
    """Not anew for every batch, until copies are dropped or the linear has another weight."""
    linear, x, copies = torch.nn.Linear(64, 64), torch.randn(5, 64), []
    rounded = torch.Tensor.bfloat16
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda t: copies.append(weakref.ref(t16 := rounded(t))) or t16)
    with rounding_once([linear]) as drop, bf16_products(True), torch.no_grad():
        for _ in range(3):
            linear(x)
        assert [copy().shape for copy in copies if copy() is not None] == [(64, 64)]
        assert len(list(linear.buffers())) == 1 and not any("bf16" in name for name in linear.state_dict())
        drop()
        assert not any(copy() is not None for copy in copies)
        linear(x)
        linear.weight = torch.nn.Parameter(2 * linear.weight)
        y = linear(x)
        drop()
        assert torch.equal(linear(x), y), "another weight, another copy"
    assert not list(linear.buffers())

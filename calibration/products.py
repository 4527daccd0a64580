"""fp32 products in bf16 with fp32 sums, where the processor has units for them (AMX): three times as fast.

Each factor is rounded to 8 bits on its way into the product, an error of 2^-9 of it at most, which is the error of a
model run in bf16 but for what lies between products: that stays fp32. The two products of attention go by a kernel that
takes bf16 and sums in fp32 as well; where gradients are asked for they stay fp32, since with bf16 that kernel's way
back is slower in rows of 512 tokens. LOG.md has what it does to the result (nothing that is larger than the choice of
text).
"""

from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def has_bf16_units() -> bool:
    """Whether this machine's processor multiplies bf16 matrices in units of their own, and torch can use them."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags and _switch() is not None


@contextmanager
def bf16_products(wanted: bool):
    """Context in which a CPU's fp32 matrix products are of bf16 factors, if wanted."""
    if not wanted or _switch() is None:
        yield
        return
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention
    try:
        with _precision("bf16"):
            yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention


@contextmanager
def _precision(wanted):
    """Context in which fp32 products are formed in another precision, "ieee" or "bf16"."""
    switch = _switch()
    before = switch.fp32_precision
    switch.fp32_precision = wanted
    try:
        yield
    finally:
        switch.fp32_precision = before


def factor(matrix):
    """A matrix that will be multiplied many times, as products take it: in bf16, rounded once, where they are of such.

    A product of two factors is `(A @ B).float()`, which is then rounded to bf16 itself.
    """
    switch = _switch()
    rounds = matrix.device.type == "cpu" and switch is not None and switch.fp32_precision == "bf16"
    return matrix.bfloat16() if rounds and matrix.dtype == torch.float32 else matrix


def _attention(module, query, key, value, attention_mask, **settings):
    """Transformers' attention by torch's fused kernel, of bf16 factors; in fp32 where gradients are asked for."""
    factors = query, key, value
    if query.device.type != "cpu" or query.dtype != torch.float32:
        return sdpa_attention_forward(module, *factors, attention_mask, **settings)
    if torch.is_grad_enabled():
        attend = partial(sdpa_attention_forward, module, attention_mask=attention_mask, **settings)
        return _Fp32Attention.apply(attend, *factors), None
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.bfloat16()
    factors = (factor.bfloat16() for factor in factors)
    out, weights = sdpa_attention_forward(module, *factors, attention_mask, **settings)
    return out.to(query.dtype), weights


class _Fp32Attention(torch.autograd.Function):
    """attend(query, key, value) and its gradients, both with products in fp32 whatever is on around them."""

    @staticmethod
    def forward(ctx, attend, *factors):
        ctx.factors = [factor.detach().requires_grad_() for factor in factors]
        with torch.enable_grad(), _precision("ieee"):
            ctx.out, _ = attend(*ctx.factors)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, gradient):
        with _precision("ieee"):
            return None, *torch.autograd.grad(ctx.out, ctx.factors, gradient, retain_graph=True)


def _switch():
    """Torch's own, since 2.9."""
    return getattr(torch.backends.mkldnn, "matmul", None)

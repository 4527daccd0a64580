"""fp32 products in bf16 with fp32 sums, where the processor has units for them (AMX): three times as fast.

Each factor is rounded to 8 bits on its way into the product, an error of 2^-9 of it at most, which is the error of a
model run in bf16 but for what lies between products: that stays fp32. The two products of attention go by a kernel that
takes bf16 and sums in fp32 as well. LOG.md has what it does to the result (nothing that is larger than the choice of
text).
"""

from contextlib import contextmanager
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
    switch = _switch() if wanted else None
    if switch is None:
        yield
        return
    before, attention = switch.fp32_precision, ALL_ATTENTION_FUNCTIONS["sdpa"]
    switch.fp32_precision = "bf16"
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention
    try:
        yield
    finally:
        switch.fp32_precision = before
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention


def factor(matrix):
    """A matrix that will be multiplied many times, as products take it: in bf16, rounded once, where they are of such.

    A product of two factors is `(A @ B).float()`, which is then rounded to bf16 itself.
    """
    switch = _switch()
    rounds = matrix.device.type == "cpu" and switch is not None and switch.fp32_precision == "bf16"
    return matrix.bfloat16() if rounds and matrix.dtype == torch.float32 else matrix


def _attention(module, query, key, value, attention_mask, **settings):
    """Transformers' attention by torch's fused kernel, of bf16 factors; where gradients are asked for, it is theirs."""
    factors = query, key, value
    if query.device.type == "cpu" and query.dtype == torch.float32 and not torch.is_grad_enabled():
        factors = (factor.bfloat16() for factor in factors)
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.bfloat16()
    out, weights = sdpa_attention_forward(module, *factors, attention_mask, **settings)
    return out.to(query.dtype), weights


def _switch():
    """Torch's own, since 2.9."""
    return getattr(torch.backends.mkldnn, "matmul", None)

"""fp32 products in bf16 with fp32 sums, where the processor has instructions for them: two to three times as fast.

Each factor is rounded to 8 bits on its way into the product, an error of 2^-9 of it at most, which is the error of a
model run in bf16 but for what lies between products: that stays fp32. LOG.md has what it does to the result (nothing
that is larger than the choice of text).

A linear that multiplies many batches is in bf16 altogether, what it gives rounded as well: its weight is then rounded
once (`rounding_once`; `rounded_linears` for estimates, where the weights are not needed any more).

With AMX oneDNN forms products of fp32 matrices so, and the two products of attention go by a kernel that takes bf16 and
sums in fp32 as well; where gradients are asked for they stay fp32, since with bf16 that kernel's way back is slower in
rows of 512 tokens. With AVX512-BF16 alone oneDNN keeps products of fp32 matrices in fp32, by kernels that on an AMD
processor are twice as fast as the library torch calls otherwise; what is in bf16 already is four times as fast, but for
attention, which is slower in it.
"""

import weakref
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LARGE = 1 << 25  # numbers, such as an output head's, for which there may be no room twice
AT_ONCE = 1 << 20  # of those, rounded at once
COPY = "weight_in_bf16"  # among the buffers, which halted forwards share and do not spill


def has_bf16_units() -> bool:
    """Whether this machine's processor has instructions for products of bf16, and torch can use them."""
    return "avx512_bf16" in _processor() and _switch() is not None


def rounded_products() -> str:
    """What is of bf16 factors under `bf16_products`: all, or without AMX what is in bf16 already, linears above all."""
    return "bf16, as are linears" if _has_amx() else "linears in bf16"


def _has_amx():
    """Whether products of fp32 matrices are of bf16 factors; AVX512-BF16 is there then too."""
    return "amx_bf16" in _processor()


@cache
def _processor():
    """What Linux says of it, its flags among that."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


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


@contextmanager
def rounded_linears(linears):
    """Context in which linears take and give fp32 but are in bf16 inside, where `bf16_products` is on.

    Weights are rounded once and not anew for every batch. What products sum is rounded to 8 bits as well:
    this is for estimates, such as of gradients' moments. The weights stay as they then are.
    """
    hooks = []
    for linear in linears if _rounds() else ():
        for parameter in linear.parameters():
            large = parameter.numel() > LARGE
            parameter.data = _rounded_in_place(parameter.data) if large else parameter.data.bfloat16()
        hooks.append(linear.register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16(),)))
        hooks.append(linear.register_forward_hook(lambda _, inputs, out: out.float()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def rounding_once(linears):
    """Context in which linears take and give fp32 but are in bf16 inside, wherever `bf16_products` is on.

    A weight is rounded when it is first read and again after it has changed; it stays as it is, beside the copy, a
    buffer of the linear's. One that is in bf16 has no copy. Where gradients are asked for there is none either; they
    are of factors in bf16 as well, and rounded to it.
    Gives a function that drops the copies, for where they are not needed any more.
    """
    linears, read = list(linears), {}

    def drop():
        for linear in read:
            linear._buffers.pop(COPY, None)
        read.clear()

    for linear in linears:
        linear.forward = partial(_in_bf16, linear, linear.forward, read)
    try:
        yield drop
    finally:
        drop()
        for linear in linears:
            del linear.forward


def _in_bf16(linear, plain, read, x):
    if not (_rounds() and x.dtype == torch.float32):
        return plain(x)
    trained, bias = torch.is_grad_enabled(), linear.bias
    weight = linear.weight if trained else _rounded(linear, read)
    weight = weight if isinstance(linear, nn.Linear) else weight.T  # transformers' Conv1D has (I, O)
    if trained:
        out = _RoundedLinear.apply(x, weight)
        return out if bias is None else out + bias
    return F.linear(x.bfloat16(), weight, None if bias is None else bias.bfloat16()).float()


class _RoundedLinear(torch.autograd.Function):
    """x W^T and its gradients, (..., I) and (O, I) in fp32, of bf16 factors and rounded to bf16."""

    @staticmethod
    def forward(ctx, x, weight):
        factors = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(*factors)
        return F.linear(*factors).float()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = gradient.bfloat16()
        of_x = (gradient @ weight).float() if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_x, None
        return of_x, (gradient.flatten(0, -2).T @ x.flatten(0, -2)).float()


def _rounded(linear, read):
    """The weight in bf16; `read` says which weight, and which version of it, a linear's copy is of."""
    weight = linear.weight
    if weight.dtype == torch.bfloat16:
        return weight
    known, version = read.get(linear, (None, None))
    if known is None or known() is not weight or version != weight._version:
        linear.register_buffer(COPY, weight.bfloat16(), persistent=False)
        read[linear] = weakref.ref(weight), weight._version
    return linear.get_buffer(COPY)


def _rounded_in_place(numbers):
    """fp32 numbers as bf16 in the first half of their memory."""
    plain = numbers.view(-1)
    rounded = plain.view(torch.bfloat16)[: len(plain)]
    for start in range(0, len(plain), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        rounded[some] = plain[some].bfloat16()
    return rounded.view(numbers.shape)


def factor(matrix):
    """A matrix that will be multiplied many times, as products take it: in bf16, rounded once, where they are of such.

    A product of two factors is `(A @ B).float()`, which is then rounded to bf16 itself.
    """
    rounds = _rounds() and matrix.device.type == "cpu" and matrix.dtype == torch.float32
    return matrix.bfloat16() if rounds else matrix


def _attention(module, query, key, value, attention_mask, **settings):
    """Transformers' attention by torch's fused kernel, of bf16 factors with AMX or where keys are kept so.

    In fp32 elsewhere, and where gradients are asked for.
    """
    factors = query, key, value
    rounds = _has_amx() or key.dtype == torch.bfloat16
    if query.device.type != "cpu" or query.dtype != torch.float32 or not rounds:
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


def _rounds():
    """Whether fp32 products are of bf16 factors here."""
    return _switch() is not None and _switch().fp32_precision == "bf16"


def _switch():
    """Torch's own, since 2.9."""
    return getattr(torch.backends.mkldnn, "matmul", None)

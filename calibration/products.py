"""fp32 products in bf16 with fp32 sums, where the processor has instructions for them: two to three times as fast.

Each factor is rounded to 8 bits on its way into the product, an error of 2^-9 of it at most, which is the error of a
model run in bf16 but for what lies between products: that stays fp32. LOG.md has what it does to the result (nothing
that is larger than the choice of text).

A linear that multiplies many batches is in bf16 altogether, what it gives rounded as well: its weight is then rounded
once (`rounding_once`; `rounded_linears` for estimates, where the weights are not needed any more).

With AMX oneDNN forms products of fp32 matrices so. With AVX512-BF16 alone it keeps them in fp32, by kernels that on an
AMD processor are twice as fast as the library torch calls otherwise; what is in bf16 already is four times as fast, but
rounded to it, so that Hessians have loops of their own (calibration/bf16_sums.py). So has attention, on any processor
(calibration/attention.py).
"""

import weakref
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from calibration.processor import has_amx, product_precision, rounds

LARGE = 1 << 25  # numbers, such as an output head's, for which there may be no room twice
AT_ONCE = 1 << 20  # of those, rounded at once
COPY = "weight_in_bf16"  # among the buffers, which halted forwards share and do not spill


def rounded_products() -> str:
    """What is of bf16 factors under `bf16_products`: all, or without AMX linears and Hessians."""
    return "bf16, as are linears" if has_amx() else "linears and Hessians in bf16"


@contextmanager
def bf16_products(wanted: bool):
    """Context in which a CPU's fp32 matrix products are of bf16 factors, if wanted."""
    with product_precision("bf16") if wanted else nullcontext():
        yield


@contextmanager
def rounded_linears(linears):
    """Context in which linears take and give fp32 but are in bf16 inside, where `bf16_products` is on.

    Weights are rounded once and not anew for every batch. What products sum is rounded to 8 bits as well:
    this is for estimates, such as of gradients' moments. The weights stay as they then are.
    """
    hooks = []
    for linear in linears if rounds() else ():
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
    if not (rounds() and x.dtype == torch.float32):
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
    of_bf16 = rounds() and matrix.device.type == "cpu" and matrix.dtype == torch.float32
    return matrix.bfloat16() if of_bf16 else matrix

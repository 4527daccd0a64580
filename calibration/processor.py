"""What this machine's processor multiplies in, and torch's switch for it."""

from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch


def has_bf16_units() -> bool:
    """Whether the processor has instructions for products of bf16, and torch can use them."""
    return "avx512_bf16" in _flags() and has_switch()


def has_amx() -> bool:
    """Whether products of fp32 matrices can be of bf16 factors; AVX512-BF16 is there then too."""
    return "amx_bf16" in _flags()


@cache
def _flags():
    """What Linux says of it, its flags among that."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def has_switch() -> bool:
    """Whether torch has one for products, as it has since 2.9."""
    return _switch() is not None


def rounds() -> bool:
    """Whether fp32 products are to be of bf16 factors now."""
    return has_switch() and _switch().fp32_precision == "bf16"


@contextmanager
def product_precision(wanted: str):
    """Context in which fp32 products are formed in another precision, "ieee" or "bf16"."""
    if not has_switch():
        yield
        return
    before = _switch().fp32_precision
    _switch().fp32_precision = wanted
    try:
        yield
    finally:
        _switch().fp32_precision = before


def _switch():
    return getattr(torch.backends.mkldnn, "matmul", None)

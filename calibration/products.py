"""fp32 products in bf16 with fp32 sums, where the processor has units for them (AMX): three times as fast.

Each factor is rounded to 8 bits on its way into the product, an error of 2^-9 of it at most, which is the error of a
model run in bf16 but for what lies between products: that stays fp32. LOG.md has what it does to the result (nothing
that is larger than the choice of text).
"""

from contextlib import contextmanager
from pathlib import Path

import torch


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
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _switch():
    """Torch's own, since 2.9."""
    return getattr(torch.backends.mkldnn, "matmul", None)

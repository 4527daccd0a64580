"""What of freed memory is kept, seen by the pages that the system has to clear anew."""

import resource

import pytest
import torch

from ptq.memory import large_blocks_kept, return_large_blocks

SIZE = 3 << 20  # fp32 numbers: 12 MB


def pages_of_one_more_tensor():
    """Pages cleared for a tensor, once glibc has had a few of its size and has found a place that it keeps to."""
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(SIZE).fill_(1)
        pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return pages


def test_large_blocks_are_kept_while_that_is_open():
    return_large_blocks()
    before = pages_of_one_more_tensor()
    if before < 1000:
        pytest.skip(f"a tensor of 12 MB took {before} pages: not glibc, or pages are larger here")
    with large_blocks_kept():
        assert pages_of_one_more_tensor() < before / 4
    assert pages_of_one_more_tensor() > before / 2

"""What of freed memory is kept, seen by the pages that the system has to clear anew."""

import json
import subprocess
import sys

import pytest

# A process of its own: in one whose heap has gaps, glibc may find another place for each tensor.
PAGES = """
import json, resource, torch
from contextlib import nullcontext
from ptq.memory import large_blocks_kept, return_large_blocks

def fewest():
    found = []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(3 << 20).fill_(1)  # 12 MB
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found)

return_large_blocks()
pages = []
for context in (nullcontext, large_blocks_kept, nullcontext):
    with context():
        pages.append(fewest())
print(json.dumps(pages))
"""


def test_large_blocks_are_kept_while_that_is_open():
    """The fewest pages of twenty tensors of 12 MB, one after the other: all of one's, next to none, all again."""
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    before, kept, after = json.loads(done.stdout)
    if before < 1000:
        pytest.skip(f"a tensor of 12 MB took {before} pages: not glibc, or pages are larger here")
    assert kept < before / 4 and after > before / 2

"""What of freed memory is kept, seen by the pages that the system has to clear anew and by what is resident."""

import json
import subprocess
import sys

import pytest

# A process of its own: in one whose heap has gaps, glibc may find another place for each tensor.
PAGES = """
import json, resource, torch
from ptq.memory import large_blocks_kept, resident_memory, return_large_blocks

def fewest():
    found = []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(3 << 20).fill_(1)  # 12 MB
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found)

return_large_blocks()
before = fewest()
with large_blocks_kept():
    kept, resident = fewest(), resident_memory()
print(json.dumps([before, kept, resident - resident_memory()]))
"""


def test_large_blocks_are_kept_while_that_is_open():
    """The fewest pages of twenty tensors of 12 MB, one after the other: all of one's, then next to none.

    Its memory is back with the system afterwards, but for what else the process took meanwhile.
    """
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    before, kept, returned = json.loads(done.stdout)
    if before < 1000:
        pytest.skip(f"a tensor of 12 MB took {before} pages: not glibc, or pages are larger here")
    assert kept < before / 4 and returned > (12 << 20) / 2

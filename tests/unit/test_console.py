"""What every command line does around its work, and what importing the package leaves behind."""

import gc
import subprocess
import sys

import pytest

from ptq.console import run_command


@pytest.mark.parametrize("before", ["enable", "disable"])
def test_importing_leaves_the_collector_as_it_was(before):
    code = f"import gc; gc.{before}(); import ptq; print(gc.isenabled(), gc.get_freeze_count())"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.split() == [str(before == "enable"), "0"]


def test_a_command_does_not_search_modules_for_garbage():
    """They count as permanent while it works, and when the interpreter ends."""
    gc.unfreeze()  # what an earlier command in this process has frozen
    objects, seen = len(gc.get_objects()), []
    try:
        run_command(lambda: seen.append(gc.get_freeze_count()))
        assert seen[0] > 0.9 * objects and gc.isenabled()  # all but what was let go of meanwhile
    finally:
        gc.unfreeze()

"""What every command line does around its work, and what importing the package leaves behind."""

import runpy
import subprocess
import sys
import textwrap

import pytest

import ptq
from ptq.console import run_command
from ptq.continuation import NEW_TOKENS
from ptq.ggml import GRID_TYPES
from ptq.grids.blocks import BLOCK_GRIDS
from ptq.lazy import Lazy

COMMANDS = ("quantize", "evaluate", "generate", "export", "report", "baselines", "benchmark")
SLOW = ("torch", "transformers", "numpy", "matplotlib")
HELP = """
import runpy, sys
sys.argv = [{command!r}, "--help"]
try:
    runpy.run_module({command!r}, run_name="__main__")
finally:
    print(*(name for name in {slow} if name in sys.modules), "loaded")
"""


def printed(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_wait_for_torch(command):
    lines = printed(HELP.format(command=f"ptq.{command}", slow=SLOW)).splitlines()
    assert lines[0].startswith("usage: ") and lines[-1].strip() == "loaded"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_that_is_none_is_one_line(command, monkeypatch, capsys):
    needed = {"generate": ["x", "--prompt", "x"], "baselines": ["--out", "x"]}.get(command, [])
    needed = needed or (["x"] if command in ("evaluate", "export", "report") else [])
    monkeypatch.setattr(sys, "argv", [command, *needed, "--no-such-flag"])
    monkeypatch.delitem(sys.modules, f"ptq.{command}", raising=False)
    with pytest.raises(SystemExit) as left:
        runpy.run_module(f"ptq.{command}", run_name="__main__")
    said = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and len(said) == 1 and said[0].startswith("error: ") and "--no-such-flag" in said[0]


def test_help_says_what_is_so():
    assert tuple(BLOCK_GRIDS) == GRID_TYPES
    assert f"(default: {NEW_TOKENS}, or" in " ".join(printed(HELP.format(command="ptq.generate", slow=SLOW)).split())


@pytest.mark.parametrize("before", ["enable", "disable"])
def test_importing_leaves_the_collector_as_it_was(before):
    code = f"import gc; gc.{before}(); import ptq; ptq.quantize_model; print(gc.isenabled(), gc.get_freeze_count())"
    assert printed(code).split() == [str(before == "enable"), "0"]


def test_a_command_does_not_search_modules_for_garbage():
    """They count as permanent once they are loaded, while it works and when the interpreter ends."""
    code = "import gc; from ptq.lazy import Lazy; Lazy('ptq.pipeline').quantize_model"
    frozen, rest = map(int, printed(f"{code}; print(gc.get_freeze_count(), len(gc.get_objects()))").split())
    assert frozen > 100 * rest


def test_a_lazy_module_is_the_module():
    lazy = Lazy("textwrap", freeze=False)
    assert lazy.wrap is textwrap.wrap
    with pytest.raises(AttributeError, match="no_such"):
        _ = lazy.no_such


def test_the_package_names_what_it_has():
    assert callable(ptq.quantize_model) and ptq.Artefact.__module__ == "ptq.pipeline"
    with pytest.raises(AttributeError, match="no_such"):
        _ = ptq.no_such


def test_a_command_that_works_returns():
    seen = []
    run_command(lambda: seen.append(1))
    assert seen == [1]

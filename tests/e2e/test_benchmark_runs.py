"""python -m ptq.benchmark as a user runs it."""

import json

import pytest
from commands import run


def test_phases_beside_their_floors(tiny, tmp_path):
    text = ["--samples", 2, "--seqlen", 16]
    flags = ["--blocks", 1, "--group", 32, *text, "--threads", 1, "--folder", tmp_path, "--json"]
    done = run("benchmark", "--model", tiny("llama"), *flags)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    phases = printed["phases"]
    solved = {"factor", "target", "baseline", "scales", "columns", "refine"}
    counted = solved | {"load", "forward", "hessian", "pack", "write"}
    assert counted <= set(phases) and all(phases[name]["ratio"] > 0 for name in counted)
    assert phases["start"]["ratio"] is None and phases["start"]["seconds"] > 0
    assert printed["blocks"] == {"run": 1, "whole": 2}
    assert phases["forward"]["whole"] == pytest.approx(2 * phases["forward"]["processor"])
    assert all(rate > 0 for rate in printed["rates"].values()) and printed["peak_bytes"] > 1e8
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--blocks", "23"], "--blocks 23: tinyllama-1.1b has 22"),
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["--bits", "9"], "bits 9 is not in 1 to 8"),
        (["--model", "nowhere"], "nowhere"),
        (["--folder", "nowhere"], "nowhere: --folder must be an existing folder"),
    ],
)
def test_mistakes_are_one_line(flags, said):
    done = run("benchmark", *flags)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1

"""python -m ptq.benchmark, down to the run it times."""

import json

import pytest
from commands import REPOSITORY
from tiny_models import make_tiny

import ptq.benchmark.__main__ as benchmark
from ptq.benchmark import rates


def test_phases_beside_their_floors(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    for size, smaller in (("SIDE", 256), ("COPIED", 1 << 20), ("FILE_BYTES", 1 << 22)):
        monkeypatch.setattr(rates, size, smaller)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    text = ["--samples", "2", "--seqlen", "16", "--group", "32"]
    flags = ["--model", str(make_tiny("llama", tmp_path / "model")), "--folder", str(scratch), "--threads", "1"]
    benchmark.main([*flags, *text, "--json"])
    printed = json.loads(capsys.readouterr().out)
    phases = printed["phases"]
    solved = {"factor", "target", "baseline", "scales", "columns", "refine"}
    counted = solved | {"load", "forward", "hessian", "pack", "write"}
    assert counted <= set(phases) and all(phases[name]["floor"] > 0 for name in counted)
    assert phases["start"]["ratio"] is None and phases["start"]["seconds"] > 0
    assert printed["blocks"] == {"run": 1, "whole": 2}
    assert phases["forward"]["whole"] == pytest.approx(2 * phases["forward"]["processor"])
    assert all(rate > 0 for rate in printed["rates"].values()) and printed["peak_bytes"] > 1e8
    assert not list(scratch.iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--blocks", "23"], "--blocks 23: tinyllama-1.1b has 22"),
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["--bits", "9"], "bits 9 is"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--folder", "/nowhere"], "/nowhere: --folder must be an existing folder"),
    ],
)
def test_mistakes_are_one_line(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(flags)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == "" and said in printed.err and printed.err.count("\n") == 1

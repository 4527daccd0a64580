"""`python -m ptq.baselines`: killed and resumed tables are the tables of an uninterrupted run."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import command, environment, run
from pages import faults, text_of
from tiny_models import TEXT, make_tiny

from ptq import evaluate
from ptq.baselines import __main__ as baselines
from ptq.evaluation.published.rows import published_rows

UNSTABLE = ("minutes", "memory")


def lines(out: Path) -> list[dict]:
    with (out / "table.csv").open(encoding="utf-8", newline="") as file:
        return [{k: v for k, v in line.items() if k not in UNSTABLE} for line in csv.DictReader(file)]


def killed(arguments, at) -> int:
    """Kills a run once `at` is true; how many of its cells were finished then."""
    process = subprocess.Popen(command("baselines", *arguments), env=environment(), stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while process.poll() is None and not at() and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    return len(list(Path(arguments[-1]).glob("cells/*/result.json")))


def assert_complete(out, source):
    """Every published figure of a source is in all three files, and the page needs nothing else."""
    markdown, page = (out / "table.md").read_text(), (out / "table.html").read_text()
    printed = [row for row in published_rows() if row.source == source]
    values = {line["value"] for line in lines(out) if source in line["origin"]}
    assert not [row for row in printed if not (row.value in values and row.value in markdown and row.value in page)]
    assert not faults(page) and "was measured in the place of" in text_of(page)


@pytest.fixture
def tiny(tmp_path):
    """Flags of a preset on a tiny model, with groups of which one is too long for it."""
    make_tiny("llama", tmp_path / "model", blocks=3)
    (tmp_path / "text.txt").write_text(TEXT * 40)
    text = tmp_path / "text.txt"
    flags = ["--preset", "bitdistiller", "--stand-in", tmp_path / "model", "--texts", text, "--calibration", text]
    small = "--samples 4 --seqlen 32 --groups 32 128 --bits 3 --max-tokens 256 --methods rtn gptq"
    return [*flags, *small.split()]


def test_killed_twice_and_one_cell_that_fails(tiny, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    done = run("baselines", *tiny, "--out", whole)
    assert done.returncode == 0, done.stderr
    assert "group 128 is longer than the 64 inputs of a linear" in done.stdout and "2 of 5 cells failed" in done.stdout
    arguments = [*tiny, "--out", out]
    first = killed(arguments, lambda: any(out.glob("cells/*-rtn/result.json")))
    second = killed(arguments, lambda: any(out.glob("cells/*-gptq/artefact.ptq-work/block-00000.safetensors")))
    done = run("baselines", *arguments)
    assert done.returncode == 0 and 1 <= first <= second < len(list(out.glob("cells/*/result.json"))) == 3
    assert lines(out) == lines(whole)
    assert not list(out.glob("cells/*/artefact*"))
    assert_complete(out, "bitdistiller")
    failed = {line["error"] for line in lines(out) if line["group"] == "128" and line["origin"] == "measured"}
    assert len(failed) == 1 and "longer than the 64 inputs" in failed.pop()


def test_the_measure_is_that_of_evaluate_and_settings_do_not_mix(tiny, tmp_path, capsys):
    arguments = [*tiny, "--groups", 32, "--bits", 3, "--methods", "rtn", "--keep", "--out", tmp_path / "out"]
    done = run("baselines", *arguments)
    assert done.returncode == 0 and list(tmp_path.glob("out/cells/*/artefact/model.safetensors"))
    found = json.loads(next(tmp_path.glob("out/cells/*-rtn/result.json")).read_text())
    artefact, text = str(next(tmp_path.glob("out/cells/*/artefact"))), str(tmp_path / "text.txt")
    evaluate.main([artefact, "--text", text, "--seqlen", "32", "--max-tokens", "256", "--json"])
    assert json.loads(capsys.readouterr().out)["perplexity"] == found["figures"][0]["value"]
    with pytest.raises(SystemExit) as left:
        baselines.main([*map(str, arguments), "--samples", "5"])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "holds cells of other settings" in said and "samples 4 -> 5" in said


SLEEPER = """
import os, pathlib, sys, time
from ptq.baselines import cells
from ptq.baselines.grid import Cell, Settings
folder = pathlib.Path(sys.argv[1])
def sleep(*_):
    (folder / "pid.partial").write_text(str(os.getpid()))
    os.rename(folder / "pid.partial", folder / "pid")
    time.sleep(100)
cells.measure_cell = sleep
print(cells.run_cell(Cell("m"), Settings(), folder, keep=False))
"""


@pytest.mark.parametrize("which", ["command", "cell"])
def test_a_killed_command_takes_its_cell_along_and_a_killed_cell_is_an_error(tmp_path, which):
    arguments = [sys.executable, "-c", SLEEPER, str(tmp_path)]
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < end:
        time.sleep(0.01)
    cell = int((tmp_path / "pid").read_text())
    os.kill(process.pid if which == "command" else cell, signal.SIGKILL)
    said = process.communicate(timeout=20)[0]
    assert said == ("" if which == "command" else "{'error': 'its process ended with signal SIGKILL'}\n")
    while running(cell) and time.monotonic() < end:
        time.sleep(0.01)
    assert not running(cell)


def running(pid: int) -> bool:
    """Whether a process is there and is no zombie that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("preset", ["bitdistiller", "onebit", "starcoder", "greenbit"])
def test_presets_on_the_embedded_model(preset, tmp_path):
    """Two to five minutes each; killed twice on the way."""
    some = ["--limit", 2] if preset == "onebit" else ["--max-tokens", 1024]
    flags = ["--preset", preset, "--stand-in", "demo", "--samples", 2, "--seqlen", 64, *some]
    out = tmp_path / "out"
    arguments = [*flags, "--out", out]
    killed(arguments, lambda: any(out.glob("cells/*-rtn/result.json")))
    killed(arguments, lambda: any(out.glob("cells/*-gptq/artefact.ptq-work/block-00001.safetensors")))
    done = run("baselines", *arguments, timeout=900)
    assert done.returncode == 0, done.stderr
    assert_complete(out, preset)
    measured = [line for line in lines(out) if line["origin"] == "measured"]
    if preset == "onebit":
        assert {"stdlib word_perplexity", "stdlib bits_per_byte"} <= {line["figure"] for line in measured}
    assert measured and not [line for line in measured if line["error"] and "omniquant" not in line["method"]]

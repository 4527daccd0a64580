"""What a run leaves to read, `python -m ptq.report`, and that drawing cannot cost a run."""

import json
from pathlib import Path

import pytest
from commands import hashes, read_report, token_file
from pages import faults, text_of
from tiny_models import make_tiny

from ptq import outcome, quantize
from ptq.evaluation.answers import artefact_hash
from ptq.report import __main__ as report
from ptq.report import files
from ptq.report.page import page

PAGES = True


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    token_file(Path("c.npy"), 4, 32)
    return tmp_path


def quantized(family="llama", out="out", *flags):
    make_tiny(family, "model", blocks=2)
    flags = ["--calibration", "c.npy", "--heldout", "c.npy", "--bits", "3", "--group", "32", *flags]
    quantize.main(["--model", "model", *flags, "--out", out])
    return Path(out)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_run_leaves_a_page_and_a_card(here, family):
    out = quantized(family)
    record, text, card = read_report(out), (out / "report.html").read_text(), (out / "README.md").read_text()
    assert not faults(text) and "http" not in text and text == page(record)
    command = "python -m ptq.quantize --model model --calibration c.npy --heldout c.npy --bits 3 --group 32 --out out"
    assert command in card and command in text_of(text) and f"{record['perplexity']['after']['perplexity']:.3f}" in card
    for name, counted in record["histograms"].items():
        outputs, inputs = record["linears"][name]["shape"]
        assert sum(counted["before"]) == sum(counted["after"]) == outputs * inputs
    kept = record["generations"]
    assert kept["prompt"] and kept["before"] and kept["after"] and kept["after"] in text_of(text)
    stored = sum(record["bytes"].values())
    assert 0 < record["file_bytes"]["after"] - stored < 20_000  # the rest is the header


def test_the_page_is_drawn_anew_with_what_both_models_say(here, capsys):
    out = quantized()
    before, identity = hashes(out), artefact_hash(out)
    (out / "report.html").unlink()
    report.main(["out", "--model", "model", "--prompt", "def", "--max-new-tokens", "5"])
    text = (out / "report.html").read_text()
    assert "written: out/report.html" in capsys.readouterr().out and not faults(text)
    assert "What it says" in text_of(text) and hashes(out) == before and artefact_hash(out) == identity
    report.main(["out"])
    assert (out / "report.html").read_text() == page(read_report(out))


def test_a_large_model_is_not_held_whole(here, monkeypatch):
    monkeypatch.setattr(outcome, "WHOLE_BYTES", 1000)
    out = quantized()
    assert read_report(out)["generations"] is None and "The likeliest token" not in (out / "report.html").read_text()


def test_a_fault_in_drawing_costs_nothing_but_the_page(here, monkeypatch, capsys):
    def broken(*_):
        raise ZeroDivisionError("drawn")

    monkeypatch.setattr(files, "page", broken)
    out = quantized()
    assert "warning: no report.html or README.md: ZeroDivisionError: drawn" in capsys.readouterr().err
    assert not (out / "report.html").exists() and (out / "model.safetensors").exists()


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        report.main(list(arguments))
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1
    return error


def test_mistakes_are_one_line(here, capsys):
    Path("empty").mkdir()
    assert "empty: has no ptq_report.json" in refused(capsys, "empty")
    Path("empty/ptq_report.json").write_text("{")
    assert "damaged" in refused(capsys, "empty")
    for record in ([], {"linears": {}}):
        Path("empty/ptq_report.json").write_text(json.dumps(record))
        assert "is no record of a run" in refused(capsys, "empty")
    assert "--max-new-tokens 0" in refused(capsys, "empty", "--max-new-tokens", "0")

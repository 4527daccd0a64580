"""Published figures: all there, verbatim, and every doubt that arithmetic can find in them named."""

import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from ptq.evaluation.published.doubts import averages, find_doubts
from ptq.evaluation.published.page import page
from ptq.evaluation.published.rows import SOURCES, PublishedRow, published_rows
from ptq.evaluation.tasks import PRESETS

ROWS = published_rows()
SEEDS = ("000", "001", "002", "003", "004")  # the documents, in the order of SOURCES
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.])")


def figures(line):
    """Numbers with a decimal point or an exponent in a table's cells or in printed metrics."""
    cells = line.split("|")[1:] if line.startswith("|") else [line]
    cells = [cell for cell in cells if not re.search(r"1\.1B|\*\*", cell)]  # names of models
    return [number for cell in cells for number in NUMBER.findall(cell) if "." in number or "e" in number]


@pytest.mark.parametrize(("seed", "source"), list(zip(SEEDS, SOURCES, strict=True)))
def test_every_figure_of_a_document_is_a_row_and_no_other(shared, seed, source):
    (document,) = (shared / "seeds").glob(f"{seed}_*.txt")
    lines = document.read_text(encoding="utf-8").splitlines()
    printed = [n for line in lines if re.match(r"\||\{|PPL: |QA avg: ", line) for n in figures(line)]
    rows = [row for row in ROWS if row.source == source]
    ours = [n for row in rows for text in (row.value, row.stderr) for n in figures(text.rstrip("%"))]
    assert len(printed) > 30 and Counter(printed) == Counter(ours)


def test_rows_of_each_source():
    assert Counter(row.source for row in ROWS) == {
        "bitdistiller": 122, "bitdistiller_short": 44, "onebit": 42, "starcoder": 20, "greenbit": 322,
    }  # fmt: skip


def test_the_shorter_revision_repeats_the_longer():
    keys = {replace(row, source="", table="") for row in ROWS if row.source == "bitdistiller"}
    assert {replace(row, source="", table="") for row in ROWS if row.source == "bitdistiller_short"} <= keys


@pytest.mark.parametrize(
    ("value", "number", "ulp"),
    [
        ("387,497.25", 387497.25, 0.01),
        ("21.25%", 21.25, 0.01),
        ("2.2e5", 2.2e5, 1e4),
        ("0", 0, 1),
        ("n/a", None, 1),
        ("-", None, 1),
    ],
)
def test_a_printed_number(value, number, ulp):
    row = PublishedRow(*["x"] * 9, value, "")
    assert row.number == number and row.error is None
    assert number is None or row.ulp == pytest.approx(ulp)


def test_names_of_the_harness():
    """Every task of a preset that a document reports is found under the harness's name."""
    printed = {source: {row.harness_task for row in ROWS if row.source == source} for source in SOURCES}
    assert set(PRESETS["qat"].tasks) <= printed["bitdistiller"]
    assert set(PRESETS["greenbit"].tasks) <= printed["greenbit"]
    assert set(PRESETS["onebit"].tasks) <= printed["onebit"]
    assert set(PRESETS["starcoder"].tasks) <= printed["starcoder"]
    assert {row.harness_metric for row in ROWS if row.share} >= {"acc", "acc_norm", "f1", "em"}


def test_bits_per_byte_are_the_logarithm_of_byte_perplexity():
    values = {(row.model, row.metric): row.number for row in ROWS if row.task == "wikitext"}
    per_word = []
    for model in {model for model, _ in values}:
        assert values[model, "bits_per_byte"] == pytest.approx(math.log2(values[model, "byte_perplexity"]), rel=1e-12)
        per_word.append(math.log2(values[model, "word_perplexity"]) / values[model, "bits_per_byte"])
    assert len(per_word) == 8 and max(per_word) == pytest.approx(min(per_word), rel=1e-12)  # the text's bytes per word


def doubts(rule):
    return [
        (doubt.rows[0].source, doubt.rows[0].model, doubt.rows[0].task, doubt.text)
        for doubt in find_doubts(ROWS)
        if doubt.rule == rule
    ]


def test_averages_that_do_not_add_up():
    assert len(averages(ROWS)) == 34 and all(len(members) >= 4 for _, members in averages(ROWS))
    assert [(model, re.findall(r"\d\d?\.\d+", text)) for _, model, _, text in doubts("average")] == [
        ("TinyLlama_v1.1_mix_wikitext_alpaca_1bit_BitDistiller_baseline", ["37.8", "38.6000"]),
        ("Llama-3.2-3B_2bit_int", ["0.4757", "0.4934"]),
        ("Llama-3.2-3B_2bit_int", ["0.4757", "0.4934"]),
        ("TinyLLaMA 1.1B q2g32", ["0.438", "0.4452"]),
        ("TinyLLaMA 1.1B q2g8", ["0.4498", "0.4562"]),
        ("LLaMA-2 7B q2g8", ["0.5391", "0.5398"]),
    ]


def test_one_row_under_two_names_and_a_cell_in_two_columns():
    (twin,) = doubts("repeated")
    assert twin[1] == "TinyLlama-2bit" and "TinyLlama_v1.1_2bit_int_3b_teacher" in twin[3]
    (cell,) = doubts("borrowed")
    assert cell[2] == "arc_challenge" and "TinyLLaMA 1.1B q2g32 and of LLaMA-2 7B q2g32" in cell[3]


def test_errors_of_one_model_are_none():
    found = doubts("stderr")
    assert {model for _, model, _, _ in found} == {"TinyLlama 2bit (7B teacher)"}
    assert len(found) == 10 and all("± 1.00" in text for *_, text in found)


def test_scores_over_a_handful_of_questions():
    texts = [text for *_, text in doubts("few questions")]
    assert sum("one answer alone" in text for text in texts) == 5
    assert [text for text in texts if "only" in text] == [
        "0.25 ± 0.0564: only 60 questions were asked",
        "0.1 ± 0.1: only 10 questions were asked",
    ]


def test_figures_that_other_documents_print_differently():
    assert "Wikitext2 12.84; 11.06 in OmniQuant's README" in [text for *_, text in doubts("elsewhere")]
    assert len(doubts("elsewhere")) == 6 and len(doubts("diverged")) == 4
    assert [text for *_, text in doubts("size")] == ["4.0 GiB; 1.1B parameters of two bytes are 2.0 GiB"]


def test_a_new_slip_is_found():
    sound = [row for row in ROWS if row.model == "Llama-2-7b-hf_2bit_int" and row.source == "bitdistiller"]
    assert not find_doubts(sound)
    slipped = [replace(row, value="74.15") if row.task == "piqa" else row for row in sound]
    assert [doubt.rule for doubt in find_doubts(slipped)] == ["average"]


def test_the_page_is_up_to_date():
    assert (Path(__file__).parents[2] / "docs/published.md").read_text(encoding="utf-8") == page()

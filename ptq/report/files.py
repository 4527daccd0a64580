"""The files of a report in an artefact's folder: the record, and two made from it."""

from pathlib import Path

from ptq.report.card import card
from ptq.report.page import Generations, page

REPORT, PAGE, CARD = "ptq_report.json", "report.html", "README.md"


def write_page(folder: Path, report: dict, generations: Generations | None = None):
    """Writes report.html."""
    (folder / PAGE).write_text(page(report, generations), encoding="utf-8")


def write_card(folder: Path, report: dict, name: str):
    """Writes README.md; `name` is what commands in it call the folder."""
    (folder / CARD).write_text(card(report, name), encoding="utf-8")

"""Sections as Markdown and CSV. A figure that does not compare stands in brackets; numbers lead to the notes below."""

import csv
import io
from collections.abc import Iterable

from ptq.baselines.rows import Figure, Row, Section, labels

WHO = ("model", "method", "bits", "group")
COSTS = ("bits per weight, linears", "whole file", "calibration", "minutes", "memory")
CSV_HEAD = (
    "section", "origin", "model", "kind", "method", "bits", "group", "teacher", "bits_per_weight_linears",
    "bits_per_weight_file", "calibration", "minutes", "memory", "figure", "value", "stderr", "comparable", "notes",
    "error",
)  # fmt: skip


LEGEND = (
    "Figures in brackets do not compare with the measured ones beside them; raised numbers lead to the notes. Published"
    " figures stand as they were printed, doubtful ones too. Accuracies measured here are in percent; documents print"
    " percent or fractions."
)


class Notes:
    """Sentences by number, in the order in which they were first needed."""

    def __init__(self):
        self.numbers: dict[str, int] = {}

    def marks(self, sentences: Iterable[str]) -> list[int]:
        """The numbers of some sentences."""
        return [self.numbers.setdefault(sentence, len(self.numbers) + 1) for sentence in sentences]


def section_tables(section: Section) -> list[tuple[list[str], list[tuple[Row, list]]]]:
    """The tables of a section: heads, and for each row its cells, text or Figure or None.

    One with perplexities and costs, and one with tasks where there are any. A row without a figure in a table is left
    out of the second.
    """
    plain, tasks = labels(section.rows)
    first = [(row, [*_who(row), *(row.figures.get(label) for label in plain), *_costs(row)]) for row in section.rows]
    tables = [([*WHO, *plain, *COSTS], first)]
    if tasks:
        rows = [row for row in section.rows if any(label in row.figures for label in tasks)]
        tables.append(([*WHO, *tasks], [(row, [*_who(row), *map(row.figures.get, tasks)]) for row in rows]))
    return tables


def _who(row):
    return [row.name, row.recipe, row.bits, row.group]


def _costs(row):
    return [*row.true_bits, row.calibration, row.minutes, row.memory]


def markdown(title: str, head: Iterable[str], sections: Iterable[Section]) -> str:
    """The tables as Markdown."""
    notes, lines = Notes(), [f"# {title}", *(part for line in (*head, LEGEND) for part in ("", line))]
    for section in sections:
        lines += ["", f"## {section.title}", "", *([section.remark, ""] if section.remark else [])]
        for number, (heads, rows) in enumerate(section_tables(section)):
            lines += [""] if number else []
            lines += [_line(["from", *heads]), "|" + "---|" * (len(heads) + 1)]
            lines += [_line([row.origin, *(_cell(cell, notes) for cell in with_error(row, cells))])
                      for row, cells in rows]  # fmt: skip
    if notes.numbers:
        lines += ["", "## Notes", "", *(f"{n}. {_escape(text)}" for text, n in notes.numbers.items())]
    return "\n".join(lines) + "\n"


def with_error(row, cells):
    """An error stands where the first figure would."""
    return [*cells[: len(WHO)], row.error, *cells[len(WHO) + 1 :]] if row.error else cells


def _line(cells):
    return "| " + " | ".join(cells) + " |"


def _cell(cell: Figure | str | None, notes: Notes) -> str:
    if not isinstance(cell, Figure):
        return _escape(cell or "")
    text = figure_text(cell)
    marks = ",".join(str(n) for n in notes.marks(cell.notes))
    return _escape(text if cell.comparable else f"({text})") + (f" <sup>{marks}</sup>" if marks else "")


def figure_text(figure: Figure) -> str:
    """Value and standard error, where there is one."""
    return figure.value + (f" ± {figure.stderr}" if has_error(figure) else "")


def has_error(figure: Figure) -> bool:
    """Whether the standard error is a number; some documents print N/A."""
    return any(letter.isdigit() for letter in figure.stderr)


def _escape(text):
    return text.replace("|", "\\|")


def long_csv(sections: Iterable[Section]) -> str:
    """One line a figure, and one for a row that has none."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(CSV_HEAD)
    for section in sections:
        for row in section.rows:
            who = (section.title, row.origin, row.name, row.kind, row.method, row.bits, row.group, row.teacher)
            costs = (*row.true_bits, row.calibration, row.minutes, row.memory)
            for label, figure in row.figures.items() or [("", Figure("", comparable=False))]:
                comparable = "yes" if figure.comparable else "no"
                printed = (label, figure.value, figure.stderr, comparable, "; ".join(figure.notes))
                lines.writerow((*who, *costs, *printed, row.error))
    return out.getvalue()

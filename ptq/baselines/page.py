"""Sections as one HTML page."""

from collections.abc import Iterable

from ptq.baselines.rows import Figure, Row, Section
from ptq.baselines.tables import WHO, Notes, has_error, section_tables, with_error
from ptq.document import Markup, document, element, table

LEGEND = (
    "Tinted rows were measured in this run. Figures in italics do not compare with the measured ones beside them;"
    " numbers lead to the reason. Published figures stand as they were printed, doubtful ones too. Accuracies measured"
    " here are in percent; documents print percent or fractions."
)


def page(title: str, head: Iterable[str], sections: Iterable[Section]) -> str:
    """The whole page."""
    notes, parts = Notes(), [element("h1", title), *(element("p", line, class_="quiet") for line in [*head, LEGEND])]
    for section in sections:
        parts.append(element("h2", section.title))
        if section.remark:
            parts.append(element("p", section.remark, class_="quiet"))
        for heads, rows in section_tables(section):
            lines = [(_row_class(row), _cells(row, cells, notes)) for row, cells in rows]
            parts.append(table(heads, lines, text_columns=len(WHO) - 2))
    if notes.numbers:
        items = (element("li", text, id=f"note-{n}") for text, n in notes.numbers.items())
        parts += [element("h2", "Notes"), element("ol", *items, class_="notes")]
    return document(title, *parts)


def _row_class(row: Row) -> str:
    return "measured" if row.measured else ""


def _cells(row, cells, notes):
    name, *rest = with_error(row, cells)
    who = Markup(element("span", name) + element("span", row.origin, class_="origin"))
    shown = [_cell(cell, notes) for cell in rest]
    if row.error:
        shown[len(WHO) - 1] = element("span", row.error, class_="failed")
    return [who, *shown]


def _cell(cell: Figure | str | None, notes: Notes) -> Markup | str:
    if not isinstance(cell, Figure):
        return cell or ""
    value = element("span", cell.value, class_="" if cell.comparable else "apart")
    error = element("span", f" ± {cell.stderr}", class_="error-bar") if has_error(cell) else ""
    links = [element("a", str(n), href=f"#note-{n}") for n in notes.marks(cell.notes)]
    return Markup(value + error + (element("sup", Markup(" ".join(links))) if links else ""))

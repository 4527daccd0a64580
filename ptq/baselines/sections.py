"""Measured rows beside published ones: a section a model, and one for models that were not to be measured."""

from collections.abc import Callable, Iterable

from ptq.baselines.grid import Cell, Grid, Model, Settings, cells_of, models_of, short_name
from ptq.baselines.published import entries_of, published_entries, without_comparison
from ptq.baselines.rows import Row, Section, measured_row


def build_sections(
    grids: Iterable[Grid],
    settings: Settings,
    sources: Iterable[str],
    result: Callable[[Cell], dict | None],
    *,
    stand_in: bool,
) -> list[Section]:
    """A section for each model of the grids.

    Args:
        grids: What is measured.
        settings: How.
        sources: Published documents, every row of which will stand in some section.
        result: What is known of a cell.
        stand_in: Whether another model was measured in the place of each.
    """
    entries = [without_comparison(entry, settings, stand_in) for entry in published_entries(sources)]
    sections, placed = [], []
    for model in models_of(grids):
        beside = entries_of(model, entries)
        measured = [measured_row(cell, result(cell)) for cell in cells_of(grids, model)]
        sections.append(Section(model.label, _remark(model, stand_in), _by_bits([*measured, *beside])))
        placed += map(id, beside)
    others = [entry for entry in entries if id(entry) not in placed]
    if others:
        remark = "Published beside the models above; nothing was measured here."
        sections.append(Section("Other models", remark, others))
    return sections


def _remark(model: Model, stand_in: bool) -> str:
    if not stand_in:
        return ""
    return (
        f"{short_name(model.source)} was measured in the place of {model.label}: no published figure compares with it."
    )


def _by_bits(rows: list[Row]) -> list[Row]:
    """The unquantized first, then bits and groups from many weights' bits to few, measured before published."""
    return sorted(rows, key=lambda row: (-_number(row.bits, 16.0), not row.measured, -_number(row.group, 1e9)))


def _number(text, otherwise):
    try:
        return float(text)
    except ValueError:
        return otherwise

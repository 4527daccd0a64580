"""Published figures as rows of a table: one row a model of a document, with its doubts and what does not compare."""

from collections import defaultdict
from collections.abc import Iterable

from ptq.baselines.grid import Model, Settings
from ptq.baselines.rows import ROUNDED, SIZE, TRAINED, UNQUANTIZED, Figure, Row
from ptq.evaluation.published.doubts import find_doubts
from ptq.evaluation.published.models import is_spelled
from ptq.evaluation.published.rows import AVERAGES, SOURCES, PublishedRow, published_rows

POST_TRAINING = ("GPTQ", "OmniQuant", "AutoGPTQ")
PERPLEXITIES = {"PPL": "perplexity of an unnamed text", "Wikitext2": "wikitext2 perplexity", "C4": "c4 perplexity"}
SIZES = ("Checkpoint Size (GiB)", "model size")

NO_FIGURE = ("n/a", "N/A", "-")

NO_TEXT = "text and windows of this perplexity are not stated"
NO_WINDOWS = "windows of this perplexity are not stated"
NO_MODEL = "the document does not name its model"
SOME_QUESTIONS = "measured here on other questions: --limit or --data-dir"


def published_entries(sources: Iterable[str]) -> list[Row]:
    """Every model of some documents; one that two documents print alike is one row."""
    doubts = defaultdict(list)
    for doubt in find_doubts(published_rows()):
        for row in doubt.rows:
            doubts[row].append(doubt.text)
    figures = defaultdict(list)
    for row in published_rows():
        if row.source in sources:
            figures[row.source, row.model, row.bits, row.group, row.method, row.teacher].append(row)
    entries = [_entry(rows, doubts) for rows in figures.values()]
    return _merged(entries)


def entries_of(model: Model, entries: Iterable[Row]) -> list[Row]:
    """Those that a document spells like a model."""
    return [entry for entry in entries if is_spelled(model.spelling, entry.name)]


def without_comparison(row: Row, settings: Settings, stand_in: bool) -> Row:
    """A row whose figures say what keeps them from being compared with measured ones."""
    for label, figure in row.figures.items():
        reason = "" if figure.value in NO_FIGURE else _reason(row, label, settings)
        if reason:
            figure.notes.append(reason)
        figure.comparable = not (reason or stand_in or figure.doubted)
    return row


def _reason(row, label, settings):
    if row.origin.startswith("onebit"):
        return NO_MODEL
    if label == PERPLEXITIES["PPL"]:
        return NO_TEXT
    if label in PERPLEXITIES.values():
        return NO_WINDOWS
    measured = settings.limit is not None or settings.data_dir is not None
    return SOME_QUESTIONS if measured and label != SIZE else ""


def _entry(rows: list[PublishedRow], doubts) -> Row:
    first = rows[0]
    entry = Row(
        origin=first.source,
        name=first.model,
        kind=_kind(first),
        method=first.method,
        bits=first.bits,
        group=first.group,
        teacher=first.teacher,
        calibration="",
    )
    for row in rows:
        notes = list(dict.fromkeys(doubts[row]))
        entry.figures[_label(row)] = Figure(row.value, row.stderr, notes=notes, doubted=bool(notes))
    return entry


def _kind(row):
    if row.method in POST_TRAINING:
        return ROUNDED
    return UNQUANTIZED if row.method in ("", "FP16") else TRAINED


def _label(row):
    if row.task in SIZES:
        return SIZE
    if row.task in AVERAGES:
        return "average"
    if row.task in PERPLEXITIES:
        return PERPLEXITIES[row.task]
    if row.table == "Groups":
        return f"{row.harness_task} {row.harness_metric} (group)"
    return f"{row.harness_task} {row.harness_metric}"


def _merged(entries):
    kept = []
    for entry in entries:
        twin = next((other for other in kept if _same(entry, other)), None)
        if twin is None:
            kept.append(entry)
        elif entry.origin not in twin.origin.split(", "):
            twin.origin += f", {entry.origin}"
            twin.figures = entry.figures | twin.figures
    return kept


def _same(entry, other):
    keys = ("name", "method", "bits", "group", "teacher")
    shared = entry.figures.keys() & other.figures.keys()
    return all(getattr(entry, key) == getattr(other, key) for key in keys) and all(
        entry.figures[label].value == other.figures[label].value for label in shared
    )


def documents(sources: Iterable[str]) -> list[str]:
    """The documents behind some sources, in words."""
    return [f"{source}: {SOURCES[source]}" for source in sources]

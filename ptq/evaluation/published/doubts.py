"""What there is to doubt in published figures, found by arithmetic; nothing is repaired.

Each rule is a function from rows to doubts. DIFFERS is the one list kept by hand: figures that other documents, the
methods' own among them, give another value.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ptq.evaluation.published.rows import AVERAGES, QA_TASKS, PublishedRow

TASK_SIZES = {"arc_easy": 2376, "arc_challenge": 1172, "piqa": 1838, "winogrande": 1267, "hellaswag": 10042}
TASK_SIZES |= {"mathqa": 2985}  # questions of the splits that the harness scores
VOCABULARY, LLAMA3_VOCABULARY = 32000, 128256
OMNIQUANT, ELUTQ = "OmniQuant's README", "ELUTQ's README"

# (model, method, bits, group, text) of a GreenBitAI row: (printed, printed elsewhere, where)
DIFFERS = {
    ("LLaMA-2-7B", "OmniQuant", "2", "128", "Wikitext2"): ("12.84", "11.06", OMNIQUANT),
    ("LLaMA-2-7B", "OmniQuant", "2", "64", "Wikitext2"): ("10.56", "9.62", OMNIQUANT),
    ("LLaMA-2-7B", "OmniQuant", "2", "128", "C4"): ("17.40", "15.02", ELUTQ),
    ("LLaMA-2-7B", "OmniQuant", "3", "128", "C4"): ("7.35", "7.75", ELUTQ),
    ("LLaMA-2-7B", "GPTQ", "2", "128", "Wikitext2"): ("2.2e5", "36.77", f"{OMNIQUANT}, where AWQ has 2.2e5"),
    ("LLaMA-2-7B", "GPTQ", "2", "128", "C4"): ("1.7e5", "33.70", f"{ELUTQ}, where AWQ has 1.7e5"),
}


@dataclass(frozen=True)
class Doubt:
    """A reason not to trust some rows: the rule that found it, the rows, and one sentence."""

    rule: str
    rows: tuple[PublishedRow, ...]
    text: str


def find_doubts(rows: Sequence[PublishedRow]) -> list[Doubt]:
    """Every doubt about rows, rule by rule."""
    return [doubt for rule in RULES for doubt in rule(rows)]


def wrong_averages(rows) -> list[Doubt]:
    """Averages that do not follow from the figures beside them, their rounding allowed for."""
    found = []
    for average, members in averages(rows):
        mean = sum(row.number for row in members) / len(members)
        rounding = (average.ulp + min(row.ulp for row in members)) / 2  # 0.4 beside 0.3618 is 0.4000
        if abs(mean - average.number) > rounding * (1 + 1e-9):
            text = f"printed {average.value}; the mean of the {len(members)} figures beside it is {mean:.4f}"
            found.append(Doubt("average", (average,), text))
    return found


def averages(rows) -> list[tuple[PublishedRow, list[PublishedRow]]]:
    """Every printed average with the figures it should be the mean of.

    QA averages are over accuracies, not normalised ones; GreenBitAI's over every metric of every task, which seven of
    its ten columns confirm; the harness's group code2text is over its languages.
    """
    columns = defaultdict(list)
    for row in rows:
        if row.number is not None:
            columns[row.source, row.model].append(row)
    return [(row, _averaged(row, column)) for column in columns.values() for row in column if _is_average(row)]


def _is_average(row):
    return row.task in AVERAGES or row.task == "codexglue_code2text"


def _averaged(average, column):
    if average.task == "codexglue_code2text":
        return [row for row in column if row.task.startswith("code2text_")]
    if average.task == "Average":
        return [row for row in column if row.task not in ("Average", "model size")]
    return [row for row in column if row.harness_task in QA_TASKS and row.harness_metric == "acc"]


def repeated_rows(rows) -> list[Doubt]:
    """Two models of one document with the same figures throughout, up to rounding."""
    tables = defaultdict(dict)
    for row in rows:
        if row.number is not None and row.harness_task in QA_TASKS:
            tables[row.source, row.model][row.harness_task, row.harness_metric] = row
    pairs = [(a, b) for a in tables for b in tables if a < b and a[0] == b[0] and tables[a].keys() == tables[b].keys()]
    return [
        Doubt("repeated", (*tables[a].values(), *tables[b].values()), f"the same figures as {b[1]}")
        for a, b in pairs
        if all(row.number == tables[b][key].number for key, row in tables[a].items())
    ]


def borrowed_cells(rows) -> list[Doubt]:
    """Columns of one table that agree in every metric of a task with several, to four digits."""
    cells = defaultdict(list)
    for row in rows:
        if row.table == "Zero-Shot Evaluation" and row.number is not None:
            cells[row.source, row.task, row.model].append(row)
    columns = defaultdict(list)
    for (source, task, _), members in cells.items():
        if len(members) > 1:
            columns[source, task, tuple(row.value for row in members)].append(members)
    return [
        Doubt("borrowed", tuple(row for members in same for row in members), _same_text(same))
        for same in columns.values()
        if len(same) > 1
    ]


def _same_text(same):
    values = ", ".join(f"{row.metric} {row.value}" for row in same[0])
    return f"{same[0][0].task} {values} in the columns of {' and of '.join(members[0].model for members in same)}"


def wrong_errors(rows) -> list[Doubt]:
    """Standard errors that are not sqrt(p (1 - p) / (n - 1)) of the accuracy p over the task's n questions."""
    found = []
    for row in rows:
        n = TASK_SIZES.get(row.harness_task)
        if n is None or row.error is None or row.number is None:
            continue
        expected = math.sqrt(row.share * (1 - row.share) / (n - 1)) * row.number / row.share
        if abs(expected - row.error) > 0.6 * row.error_ulp + 1e-12:  # 0.5, and room for the accuracy's own rounding
            found.append(Doubt("stderr", (row,), f"± {row.stderr}; {n} questions give ± {expected:.2f}"))
    return found


def few_questions(rows) -> list[Doubt]:
    """Scores over so few questions that models differ by chance: one answer above zero, or n from the error."""
    found = []
    for row in rows:
        if row.source != "starcoder" or not row.error:
            continue
        if row.metric == "acc":
            n = round(row.number * (1 - row.number) / row.error**2) + 1
            text = f"{row.value} ± {row.stderr}: only {n} questions were asked"
            found.append(Doubt("few questions", (row,), text))
        elif row.value == row.stderr:  # the mean of n figures equals its error when all but one of them are zero
            found.append(Doubt("few questions", (row,), f"{row.value} ± {row.stderr}: one answer alone is not zero"))
    return found


def worse_than_guessing(rows) -> list[Doubt]:
    """Token perplexities above the size of the vocabulary: the run diverged."""
    found = []
    for row in rows:
        words = LLAMA3_VOCABULARY if row.model.startswith("Llama-3") else VOCABULARY
        if row.task in ("PPL", "Wikitext2", "C4") and (row.number or 0) > words:
            found.append(Doubt("diverged", (row,), f"{row.value} is worse than a uniform guess among {words} tokens"))
    return found


def wrong_sizes(rows) -> list[Doubt]:
    """16-bit checkpoints of half as many bytes again as two for each parameter that the model's name tells."""
    found = []
    for row in rows:
        billions = re.search(r"([\d.]+)B\b", row.model)
        if row.bits == "16" and "GiB" in (row.task + row.metric) and billions:
            expected = 2e9 * float(billions[1]) / 2**30
            if row.number > 1.5 * expected:
                text = f"{row.value} GiB; {billions[0]} parameters of two bytes are {expected:.1f} GiB"
                found.append(Doubt("size", (row,), text))
    return found


def other_documents(rows) -> list[Doubt]:
    """Figures for which other documents print another value (DIFFERS)."""
    found = []
    for row in rows:
        key = (row.model, row.method, row.bits, row.group, row.task)
        printed, other, where = DIFFERS.get(key, ("", "", ""))
        if row.source == "greenbit" and row.value == printed:
            found.append(Doubt("elsewhere", (row,), f"{row.task} {row.value}; {other} in {where}"))
    return found


RULES = (
    wrong_averages,
    repeated_rows,
    borrowed_cells,
    wrong_errors,
    few_questions,
    worse_than_guessing,
    wrong_sizes,
    other_documents,
)

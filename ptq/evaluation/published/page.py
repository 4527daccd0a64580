"""docs/published.md: `python -m ptq.evaluation.published.page > docs/published.md`."""

from collections import Counter
from itertools import groupby

from ptq.evaluation.published.doubts import Doubt, averages, find_doubts
from ptq.evaluation.published.rows import SOURCES, published_rows

RULES = {
    "average": "Averages that do not add up",
    "repeated": "The same figures under two names",
    "borrowed": "The same cells in two columns",
    "stderr": "Standard errors that no number of questions gives",
    "few questions": "Few questions",
    "diverged": "Worse than guessing",
    "size": "Sizes",
    "elsewhere": "Other documents print another figure",
}

HEAD = """# Published figures

`ptq/evaluation/published/` holds figures that others printed, one row a figure, verbatim. What is doubtful is flagged
and stays as it is. This page is made by `python -m ptq.evaluation.published.page`; a test compares it with the data.

"""


def page() -> str:
    """The page as Markdown."""
    rows = published_rows()
    counts = Counter(row.source for row in rows)
    lines = ["| source | document | rows |", "|---|---|---|"]
    lines += [f"| `{key}` | {document} | {counts[key]} |" for key, document in SOURCES.items()]
    lines += [
        "",
        f"{len(averages(rows))} averages were computed again. Perplexities of different documents do not compare:",
    ]
    lines += ["texts, windows and tokenizers differ, and most documents do not say which they used.", "", "## Doubts"]
    for rule, doubts in groupby(find_doubts(rows), key=lambda doubt: doubt.rule):
        lines += ["", f"### {RULES[rule]}", "", "| source | model | figure | doubt |", "|---|---|---|---|"]
        lines += [_line(doubt) for doubt in doubts]
    return HEAD + "\n".join(lines) + "\n"


def _line(doubt: Doubt) -> str:
    row = doubt.rows[0]
    method = f", {row.method}" if row.method and row.method not in row.model else ""
    grid = "".join(f" {letter}{value}" for letter, value in (("w", row.bits), ("g", row.group)) if value)
    figure = f"{row.task} {row.metric}".rstrip() if len(doubt.rows) == 1 else f"{len(doubt.rows)} figures"
    return f"| `{row.source}` | {row.model}{method}{grid} | {figure} | {doubt.text} |"


if __name__ == "__main__":
    print(page(), end="")

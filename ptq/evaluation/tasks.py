"""Which tasks a published table asks for, and tasks whose questions lie in local files.

A local file has one JSON object a line: `query`, `choices`, `gold`; or `context_options`, `continuation`, `gold`, where
the choice comes first; or `context`, `continuation`; or `page`, a document whose perplexity is wanted. The prompt is
what the harness makes of the same question.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from calibration.errors import InputError

QA = ("arc_easy", "arc_challenge", "piqa", "winogrande", "hellaswag")


@dataclass(frozen=True)
class Preset:
    """The tasks of a published table, and the average printed under it: of one metric over some tasks, or of all."""

    tasks: tuple[str, ...]
    average: str = ""
    metric: str = ""
    averaged: tuple[str, ...] = ()


GREENBIT = ("openbookqa", "arc_challenge", "hellaswag", "piqa", "arc_easy", "winogrande", "boolq", "truthfulqa_mc1")
GREENBIT += ("truthfulqa_mc2", "anli_r1", "anli_r2", "anli_r3", "wic", "rte", "record")
CODE_LINE = "bigbench_code_line_description"
PRESETS = {
    "qat": Preset((*QA, "mmlu"), "QA Avg", "acc", QA),
    "greenbit": Preset(GREENBIT, "Average", "", GREENBIT),
    "onebit": Preset(("wikitext", "hellaswag", "mathqa")),
    "starcoder": Preset(("code2text", f"{CODE_LINE}_generate_until", f"{CODE_LINE}_multiple_choice")),
}

FILES = {"mathqa": "math_qa", "openbookqa": "openbook_qa"}  # file names that are not the task's
ACC = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
ACC_NORM = [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}]
PERPLEXITY = [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]
PROMPTS = {  # with the same question from the hub, the harness prints the same text
    "arc_easy": {"doc_to_text": "{{query}}\nAnswer:"},
    "arc_challenge": {"doc_to_text": "{{query}}\nAnswer:"},
    "piqa": {"doc_to_text": "{{query.rstrip()}}\nAnswer:"},
    "boolq": {"doc_to_text": "{{query.removeprefix('Passage: ')}}\nAnswer:", "metric_list": ACC},
    "mathqa": {"doc_to_text": "{{query.rstrip()}}"},  # choices are letters here and numbers in the harness's mathqa
}

# What a line's keys make of it: what each must hold, and what the harness is told.
LAYOUTS = {
    ("query", "choices", "gold"): {
        "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold",
        "metric_list": ACC + ACC_NORM,
    },
    ("context_options", "continuation", "gold"): {
        "output_type": "multiple_choice", "doc_to_choice": "context_options", "doc_to_target": "continuation",
        "doc_to_text": "gold", "metric_list": ACC,
    },
    ("page",): {
        "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    ("context", "continuation"): {
        "output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": "{{' ' + continuation}}",
        "metric_list": PERPLEXITY + ACC,
    },
}  # fmt: skip
KINDS = {"query": str, "choices": list, "gold": int, "context_options": list, "continuation": str, "context": str}
KINDS |= {"page": str}
TITLE = re.compile(r"= (?!=).*(?<!=) =")  # one "=" on each side; sections of an article have more


def choose_tasks(wanted: str, data_dir: Path | None = None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tasks of a preset, or names with commas between; and those of a preset for which a folder has no file.

    Raises:
        InputError: Nothing is left, or there is no such folder.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise InputError(f"--data-dir {data_dir}: there is no such folder")
    if wanted not in PRESETS:
        names = tuple(dict.fromkeys(name.strip() for name in wanted.split(",") if name.strip()))
        if not names:
            raise InputError(f"--tasks {wanted!r} names no task; presets: {', '.join(PRESETS)}")
        return names, ()
    names = PRESETS[wanted].tasks
    absent = tuple(name for name in names if data_dir is not None and not _file(name, data_dir).is_file())
    if absent == names:
        raise InputError(f"--data-dir {data_dir}: has no file for any of {', '.join(names)}")
    return tuple(name for name in names if name not in absent), absent


def local_config(name: str, data_dir: Path) -> dict:
    """The harness's config of a task whose questions lie in a folder; `rows` holds them.

    Raises:
        InputError: There is no file, or a line breaks a rule of the layout.
    """
    file = _file(name, data_dir)
    if not file.is_file():
        raise InputError(f"--data-dir {data_dir}: has no {file.name} for the task {name}")
    return _config(name, *_rows(file))


def pages_config(name: str, pages: Iterable[str]) -> dict:
    """The same of documents whose perplexity is wanted.

    Raises:
        InputError: There are none.
    """
    rows = [{"page": page} for page in pages if page.strip()]
    if not rows:
        raise InputError(f"the text for {name} is empty")
    return _config(name, rows, ("page",))


def articles(text: str) -> list[str]:
    """A text in WikiText's markup as its articles, each from its title to the next; another text as it is."""
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if TITLE.fullmatch(line.strip())]
    bounds = [0, *starts, len(lines)]
    pages = ["\n".join(lines[first:last]) for first, last in pairwise(bounds)]
    return [page for page in pages if page.strip()]


def _config(name, rows, layout):
    settings = {"doc_to_text": "{{query}}"} | LAYOUTS[layout] | PROMPTS.get(name, {})
    return {"task": name, "test_split": "test", "metadata": {"version": "local"}, "rows": rows, **settings}


def _file(name, data_dir):
    return Path(data_dir) / f"{FILES.get(name, name)}.jsonl"


def _rows(file) -> tuple[list[dict], tuple[str, ...]]:
    rows = [(number, _row(line, file, number)) for number, line in _lines(file)]
    if not rows:
        raise InputError(f"{file}: holds no questions")
    layout = next((keys for keys in LAYOUTS if set(keys) <= rows[0][1].keys()), None)
    if layout is None:
        raise InputError(
            f"{file}: line {rows[0][0]}: has none of the layouts {'; '.join(', '.join(k) for k in LAYOUTS)}"
        )
    for number, row in rows:
        _check(row, layout, f"{file}: line {number}")
    return [{key: row[key] for key in layout} for _, row in rows], layout


def _lines(file) -> Iterable[tuple[int, str]]:
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start}") from None
    return ((number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip())


def _row(line, file, number):
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        raise InputError(f"{file}: line {number}: not a JSON object")
    return row


def _check(row, layout, where):
    for key in layout:
        if type(row.get(key)) is not KINDS[key]:
            raise InputError(f"{where}: {key!r} must be a {KINDS[key].__name__}")
    options = row.get("choices", row.get("context_options"))
    if options is None:
        return
    if not options or not all(isinstance(option, str) and option for option in options):
        raise InputError(f"{where}: its choices must be strings that are not empty")
    if not 0 <= row["gold"] < len(options):
        raise InputError(f"{where}: gold {row['gold']} is not one of its {len(options)} choices")

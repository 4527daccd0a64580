"""Published figures, one row a figure, as printed; a doubtful one stays as it is (see doubts.py)."""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

# Each CSV file here and the public document whose tables it holds.
SOURCES = {
    "bitdistiller": "github.com/BrownianNotion/BitDistiller, results.md",
    "bitdistiller_short": "github.com/BrownianNotion/BitDistiller, results.md, a shorter revision",
    "onebit": "github.com/leszkolukasz/training-1.58bit-llms-via-distillation, data/benchmark.md",
    "starcoder": "github.com/cosmo3769/Quantized-LLMs, README.md",
    "greenbit": "github.com/GreenBitAI/low_bit_llama, README.md",
}

# lm-evaluation-harness's names for what documents spell in their own ways; other names are its own already.
TASKS = {
    "ARC Challenge": "arc_challenge",
    "ARC Easy": "arc_easy",
    "ARC-Challenge": "arc_challenge",
    "ARC-Easy": "arc_easy",
    "HellaSwag": "hellaswag",
    "hellawswag": "hellaswag",
    "Openbookqa": "openbookqa",
    "PIQA": "piqa",
    "Winogrande": "winogrande",
    "codexglue_code2text": "code2text",
}
TRUTHFULQA = {"mc1": "truthfulqa_mc1", "mc2": "truthfulqa_mc2"}  # one task with two metrics then, two tasks now
METRICS = {
    "": "acc",
    "Accuracy": "acc",
    "Normalized Accuracy": "acc_norm",
    "ac_norm": "acc_norm",
    "mc1": "acc",
    "mc2": "acc",
}
QA_TASKS = ("arc_easy", "arc_challenge", "piqa", "winogrande", "hellaswag")
AVERAGES = ("QA Avg", "QA avg", "Average")


@dataclass(frozen=True)
class PublishedRow:
    """One printed figure. Every field is text; what a document does not say is empty.

    Attributes:
        source: Key of SOURCES.
        table: The section it stands in.
        model: The model's name there.
        bits: Bits of a weight; 16 for an unquantized model.
        group: Weights that share a scale.
        method: Who or what quantized.
        teacher: The teacher of a distillation.
        task: Task, text or quantity.
        metric: Which figure of the task, where there are several.
        value: The figure, with its percent sign or thousands separator.
        stderr: Its standard error.
    """

    source: str
    table: str
    model: str
    bits: str
    group: str
    method: str
    teacher: str
    task: str
    metric: str
    value: str
    stderr: str

    @property
    def number(self) -> float | None:
        """The figure; None for "n/a" and the like."""
        return _number(self.value)

    @property
    def error(self) -> float | None:
        """The standard error in the value's unit."""
        return _number(self.stderr)

    @property
    def share(self) -> float | None:
        """An accuracy as a fraction, printed as such or in percent."""
        number = self.number  # 1 % or less is no accuracy of a task with a few choices
        return number / 100 if number is not None and number > 1 else number

    @property
    def ulp(self) -> float:
        """One unit of the last printed digit."""
        return _ulp(self.value)

    @property
    def error_ulp(self) -> float:
        """One unit of the standard error's last printed digit."""
        return _ulp(self.stderr)

    @property
    def harness_task(self) -> str:
        """The task by the harness's name."""
        return TRUTHFULQA.get(self.metric) or TASKS.get(self.task, self.task)

    @property
    def harness_metric(self) -> str:
        """The metric by the harness's name; a QA table that names none prints acc."""
        return METRICS.get(self.metric, self.metric)


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """Every row, in the order of SOURCES and of the documents."""
    rows = []
    for source in SOURCES:
        with (files(__package__) / f"{source}.csv").open(encoding="utf-8", newline="") as lines:
            rows += [PublishedRow(source=source, **row) for row in csv.DictReader(lines)]
    return tuple(rows)


def _number(text):
    try:
        return float(text.rstrip("%").replace(",", ""))
    except ValueError:
        return None


def _ulp(text):
    mantissa, _, exponent = text.rstrip("%").partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))

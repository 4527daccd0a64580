"""A table in parts: rows of figures, measured or published, section by section."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ptq.baselines.grid import FULL, Cell

MEASURED = "measured"
TRAINED, ROUNDED, UNQUANTIZED = "QAT", "PTQ", ""  # with the training, after it, not at all
SIZE = "file, GiB"
KL, SAME = "KL divergence, nats", "same token, %"  # as ptq.evaluate --reference has them
PERCENT = ("", "acc", "acc_norm", "exact_match", "f1", "em", SAME)  # "": an average of such
OF_TEXTS = ("perplexity", "bits_per_byte", KL, SAME)
GIB = 2**30


@dataclass
class Figure:
    """A figure as it is printed: value, standard error, what there is to say about it, whether it may be compared."""

    value: str
    stderr: str = ""
    notes: list[str] = field(default_factory=list)
    comparable: bool = True
    doubted: bool = False


@dataclass
class Row:
    """One model as somebody quantized it. Every field is text; what is not known is empty.

    Attributes:
        origin: MEASURED, or the keys of the published sources.
        name: What was measured, or the model's name in the document.
        kind: TRAINED, ROUNDED or UNQUANTIZED.
        method: Who or what quantized.
        bits: Bits of a weight, as the method counts them.
        group: Weights that share a scale.
        teacher: Of a distillation.
        calibration: Text and rows.
        true_bits: Bits per weight of the quantized linears with scales and all, and of the whole file.
        minutes: To quantize.
        memory: Most of it while quantizing.
        figures: By label.
        error: Why there are none.
    """

    origin: str
    name: str
    kind: str
    method: str = ""
    bits: str = ""
    group: str = ""
    teacher: str = ""
    calibration: str = ""
    true_bits: tuple[str, str] = ("", "")
    minutes: str = ""
    memory: str = ""
    figures: dict[str, Figure] = field(default_factory=dict)
    error: str = ""

    @property
    def recipe(self) -> str:
        """Method, kind and teacher in words."""
        return ", ".join(filter(None, (self.method, self.kind, self.teacher and f"teacher {self.teacher}")))

    @property
    def measured(self) -> bool:
        """Whether it comes from this run."""
        return self.origin == MEASURED


@dataclass
class Section:
    """A model's rows under its name, with what holds for all of them."""

    title: str
    remark: str
    rows: list[Row]


def measured_row(cell: Cell, result: dict | None) -> Row:
    """A cell's row; without a result it says that it is still to come."""
    full = cell.method == FULL
    row = Row(
        origin=MEASURED,
        name=cell.model.rpartition("/")[2],
        kind=UNQUANTIZED if full else ROUNDED,
        method="" if full else _method(cell),
        bits=str(cell.bits),
        group={0: "", -1: "row"}.get(cell.group, str(cell.group)),
    )
    if result is None or "error" in result:
        row.error = "not measured yet" if result is None else result["error"]
        return row
    row.figures = {label: figure for label, figure in map(_measured_figure, result["figures"])}
    if not full:
        _add_costs(row, result)
    return row


def _method(cell):
    layout = cell.ggml_type or ("" if cell.format == "gptq" else cell.format)
    return cell.method + (f", {layout}" if layout else "")


def _measured_figure(score) -> tuple[str, Figure]:
    label = f"{score['task']} {score['metric']}".strip()
    factor = 100 if score["metric"] in PERCENT else 1
    error = "" if score["stderr"] is None else _short(factor * score["stderr"], score["metric"])
    return label, Figure(_short(factor * score["value"], score["metric"]), error)


def _short(value, metric):
    if metric == KL:  # of 8 bits 1e-5, of 2 bits 1e-1
        return f"{value:.3g}"
    return f"{value:.2f}" if value < 10000 else f"{value:.3g}"


def _add_costs(row, result):
    bits, calibration = result["bits_per_weight"], result["calibration"]
    row.true_bits = (f"{bits['linears']:.2f}", f"{bits['after']:.2f}")
    row.minutes = _minutes(result["seconds"], result["resumed"])
    row.memory = ", ".join(f"{n / 1e9:.1f} GB{' GPU' if kind == 'gpu' else ''}" for kind, n in
                           result["peak_memory_bytes"].items())  # fmt: skip
    row.calibration = "none" if calibration is None else _text_of(calibration)
    row.figures[SIZE] = Figure(f"{result['file_bytes']['after'] / GIB:.3g}")


def _minutes(seconds, resumed):
    """Of a resumed run only the last part is known."""
    if resumed:
        return f"> {seconds / 60:.1f}"
    return "< 0.1" if seconds < 6 else f"{seconds / 60:.1f}"


def _text_of(calibration):
    return f"{Path(calibration['source']).name}, {calibration['samples']} x {calibration['seqlen']}"


def labels(rows: Iterable[Row]) -> tuple[list[str], list[str]]:
    """Labels of perplexities and sizes, and of tasks, in the order in which they turn up, averages last."""
    found = list(dict.fromkeys(label for row in rows for label in row.figures))
    plain = [label for label in found if label == SIZE or any(kind in label for kind in OF_TEXTS)]
    tasks = sorted((label for label in found if label not in plain), key=lambda label: label == "average")
    return sorted(plain, key=lambda label: label == SIZE), tasks

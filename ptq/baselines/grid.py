"""What is to be measured: models x methods x bits x groups x formats x types, and the settings that all cells share."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from calibration.errors import InputError
from ptq.ggml import GRID_TYPES, TYPE_OF_BITS, check_type
from ptq.spec import CHECKPOINT_FORMATS, METHODS, QuantSpec, omniquant_recipe

FULL = "none"  # the method of a model that is measured as it is
GGUF, OF_BLOCKS = "gguf", ("gptq", "rtn")  # a format whose types are its grids, and the methods that take those
COST = {FULL: 1, "rtn": 2, "gptq": 20, "omniquant": 400}  # minutes beside each other; a new method is taken as dear
UNKNOWN_COST, UNKNOWN_SIZE = 400, 7.0


@dataclass(frozen=True)
class Model:
    """A model of a table: where it is, what the table calls it, and how documents spell it (a regular expression)."""

    source: str
    label: str
    spelling: str = "(?!)"

    def stood_in_by(self, source: str) -> "Model":
        """The same place in the table, measured on another model."""
        return replace(self, source=source)


@dataclass(frozen=True)
class Settings:
    """What all cells share and what decides their figures.

    Raises:
        InputError: A number is not positive, or the protocol has no use for one.

    Attributes:
        texts: Texts of the perplexity: corpus names or files.
        protocol: Of the perplexity.
        divergence: Also KL divergence from the unquantized model, and how often the likeliest token is its.
        max_tokens: Of each text; None for all of it. Protocol lm-eval takes whole documents.
        calibration: Corpus name or file.
        samples: Rows of calibration text.
        seqlen: Tokens in a row and in a window; None for the usual ones.
        asym: A zero point per group.
        tasks: Preset or names of tasks; None for none.
        limit: Questions of each task, documents of protocol lm-eval; None for all.
        data_dir: Folder of local questions.
        seed: Draws the calibration rows.
        device: As choose_device.
        dtype: As choose_dtype.
    """

    texts: tuple[str, ...] = ("wikitext2",)
    protocol: str = "gptq"
    divergence: bool = False
    max_tokens: int | None = None
    calibration: str = "c4"
    samples: int = 128
    seqlen: int | None = None
    asym: bool = False
    tasks: str | None = None
    limit: int | None = None
    data_dir: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self):
        for name in ("max_tokens", "samples", "seqlen", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.protocol == "lm-eval" and self.max_tokens is not None:
            raise InputError("--protocol lm-eval takes whole documents: no --max-tokens; --limit counts documents")
        if self.protocol == "lm-eval" and self.divergence:
            raise InputError("--divergence compares tokens of windows: --protocol lm-eval has none")

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self) | {"texts": list(self.texts)}

    def label(self, text: str) -> str:
        """A text's name in a table: of a file its last part, unless two files share it."""
        names = [Path(each).name for each in self.texts]
        return Path(text).name if names.count(Path(text).name) == 1 else text

    def in_words(self) -> str:
        """One sentence for the head of a table."""
        length = "usual windows" if self.seqlen is None else f"windows of {self.seqlen}"
        tokens = "" if self.max_tokens is None else f", the first {self.max_tokens} tokens"
        tasks = (
            ""
            if self.tasks is None
            else f" Tasks: {self.tasks}{'' if self.limit is None else f', {self.limit} questions each'}."
        )
        return (
            f"Measured: perplexity by protocol {self.protocol} on {', '.join(map(self.label, self.texts))},"
            f" {length}{tokens};"
            f" calibrated on {self.samples} rows of {Path(self.calibration).name};"
            f" {'a' if self.asym else ''}symmetric grids.{tasks}"
        )


@dataclass(frozen=True)
class Cell:
    """One artefact to make and measure, or with method FULL a model to measure as it is."""

    source: str
    method: str = FULL
    bits: float = 16
    group: int = 0
    format: str = ""
    ggml_type: str = ""

    @property
    def name(self) -> str:
        """Its folder's name."""
        model = re.sub(r"[^\w.]+", "-", self.model)
        if Path(self.source).is_dir():  # two folders may have one name
            model += "-" + hashlib.sha256(str(Path(self.source).resolve()).encode()).hexdigest()[:6]
        if self.method == FULL:
            return f"{model}-full"
        if self.format == GGUF:
            return f"{model}-{self.ggml_type}-{self.method}"
        group = "" if self.group == -1 else f"g{self.group}"
        layout = "" if self.format == CHECKPOINT_FORMATS[0] else f"-{self.format}"
        return f"{model}-w{self.bits}{group}-{self.method}{layout}"

    @property
    def model(self) -> str:
        """The model's name: a folder's own, or the hub id."""
        return short_name(self.source)

    @property
    def cost(self) -> float:
        """Roughly, in seconds of no particular machine: billions of parameters times the method's."""
        return _billions(self.source) * COST.get(self.method, UNKNOWN_COST)

    def spec(self, settings: Settings) -> QuantSpec:
        """Its recipe.

        Raises:
            InputError: As QuantSpec.
        """
        recipe = {"sym": not settings.asym or self.bits < 2}
        if self.format == GGUF:  # the type decides bits, groups and symmetry
            return QuantSpec(method=self.method, checkpoint_format=GGUF, ggml_type=self.ggml_type, seed=settings.seed)
        if self.method == "omniquant":
            recipe = omniquant_recipe(self.bits)
        return QuantSpec(
            bits=self.bits,
            group_size=self.group,
            method=self.method,
            checkpoint_format=self.format,
            seed=settings.seed,
            **recipe,
        )


@dataclass(frozen=True)
class Grid:
    """Models by every combination of the rest; files of llama.cpp by their types, or else by the usual type of bits.

    Raises:
        InputError: Something is unknown, or the axes leave nothing to make.
    """

    models: tuple[Model, ...]
    methods: tuple[str, ...] = METHODS
    bits: tuple[float, ...] = (2,)
    groups: tuple[int, ...] = (128,)
    formats: tuple[str, ...] = CHECKPOINT_FORMATS[:1]
    types: tuple[str, ...] = ()

    def __post_init__(self):
        for flag, values, known in (("methods", self.methods, METHODS), ("formats", self.formats, CHECKPOINT_FORMATS)):
            for value in values:
                if value not in known:
                    raise InputError(f"--{flag} {value}: is not one of {', '.join(known)}")
        for name in self.types:
            check_type("types", name, GRID_TYPES)
        if self.types and GGUF not in self.formats:
            raise InputError("--types are llama.cpp's: they need --formats gguf")
        if self.formats == (GGUF,) and not set(self.methods) & set(OF_BLOCKS):
            raise InputError(f"--formats gguf takes --methods {' or '.join(OF_BLOCKS)}, not {', '.join(self.methods)}")

    def cells(self, model: Model) -> list[Cell]:
        """A model's cells, the unquantized one first."""
        uniform = [layout for layout in self.formats if layout != GGUF]
        points = list(product(self.methods, self.bits, self.groups, uniform))
        if GGUF in self.formats:
            points += [(method, *kind) for method in self.methods if method in OF_BLOCKS for kind in self._kinds()]
        return [Cell(model.source), *(Cell(model.source, *point) for point in points)]

    def _kinds(self):
        """(bits, group, format, type) of llama.cpp's files; bits are the number in a type's name."""
        names = self.types or tuple(_usual_type(bits) for bits in self.bits)
        return [(int(re.search(r"\d", name)[0]), 0, GGUF, name) for name in names]


def _usual_type(bits):
    if bits not in TYPE_OF_BITS:
        raise InputError(f"--bits {bits}: no llama.cpp type is the usual one for them; choose with --types")
    return TYPE_OF_BITS[bits]


def short_name(source: str) -> str:
    """A folder's own name, or a hub id as it is."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def cells_of(grids: Iterable[Grid], model: Model) -> list[Cell]:
    """A model's cells in all grids, each once."""
    return list(dict.fromkeys(cell for grid in grids if model in grid.models for cell in grid.cells(model)))


def models_of(grids: Iterable[Grid]) -> list[Model]:
    """The models of all grids, each once."""
    return list(dict.fromkeys(model for grid in grids for model in grid.models))


def in_order_of_cost(grids: Iterable[Grid]) -> list[Cell]:
    """Every cell once, the cheapest first."""
    return sorted({cell: None for model in models_of(grids) for cell in cells_of(grids, model)}, key=lambda c: c.cost)


def _billions(source: str) -> float:
    """Parameters in billions: from the weight files of a folder, at two bytes each, or from a hub id's name."""
    files = list(Path(source).glob("*.safetensors"))
    if files:
        return sum(file.stat().st_size for file in files) / 2e9
    named = re.search(r"(\d+(?:\.\d+)?)([bm])(?![a-z])", source, re.IGNORECASE)
    return UNKNOWN_SIZE if named is None else float(named[1]) / (1000 if named[2] in "mM" else 1)

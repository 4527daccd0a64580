"""Which programs load a GPTQ folder, and why the others do not.

The rules read what the loaders read: the written quantization_config, the shapes of the linears, the architecture. They
are those of GPTQModel 7.6 and transformers 5.23 on a CPU, vLLM's Marlin layer and ExLlamaV2; docs/formats.md says which
were tried here and which stand on a runtime's source alone. Of architectures only the ones that failed here are known.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from ptq.export.gptq import quantization_config

GPTQMODEL, TRANSFORMERS = "GPTQModel", "transformers + GPTQModel"
GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
INT4_GROUPS = (-1, 16, 32, 64, 128)  # of its default 4-bit CPU kernels; larger ones run in a kernel that takes all
INT4_COLUMNS = (32, 64, 128, 256)  # what torch's operator under those kernels takes
MARLIN_GROUPS = (-1, 32, 64, 128)
EXLLAMA_GROUPS = (-1, 32, 64, 128, 256, 512, 1024)
UNREAD = {  # (runtime, model_type): what it does with a GPTQ file of that architecture, whoever wrote it
    (TRANSFORMERS, "gpt2"): "its GPT-2 code asks a packed linear for its weight",
    (TRANSFORMERS, "gpt_bigcode"): "its GPTBigCode code asks a packed linear for its weight",
    (GPTQMODEL, "phi3"): "it looks for gate_proj and up_proj where Phi-3 files have gate_up_proj",
    (GPTQMODEL, "glm"): "it looks for gate_proj and up_proj where GLM files have gate_up_proj",
    (GPTQMODEL, "glm4"): "it looks for gate_proj and up_proj where GLM files have gate_up_proj",
    (GPTQMODEL, "gpt_neox"): "it leaves out the head, which GPT-NeoX files call embed_out",
}


@dataclass(frozen=True)
class Runtime:
    """A runtime's verdict; `why` is empty if it loads the file."""

    name: str
    loads: bool
    why: str

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


def runtimes(spec, shapes: Iterable[tuple[int, int]], model_type: str = "") -> list[Runtime]:
    """Verdicts for a checkpoint.

    Args:
        spec: QuantSpec.
        shapes: (O, I) of the quantized linears.
        model_type: As in config.json.
    """
    shapes = list(shapes)
    config = quantization_config(spec)
    bits, group, sym = config["bits"], config["group_size"], config["sym"]
    v1 = config["checkpoint_format"] == "gptq"
    ragged = group != -1 and any(inputs % group for _, inputs in shapes)
    tiles = all(outputs % 64 == 0 and inputs % 128 == 0 for outputs, inputs in shapes)
    gptqmodel = (
        (group in GPTQMODEL_GROUPS, f"group {group}; its kernels have {_listed(GPTQMODEL_GROUPS)}"),
        (
            bits != 4 or group not in INT4_GROUPS or _fits_int4(group, shapes),
            "its default 4-bit CPU kernel needs groups of 32, 64 or 128 that divide the inputs;"
            " its backend gptq_torch does not",
        ),
    )
    rules = {
        TRANSFORMERS: gptqmodel,
        GPTQMODEL: (
            *gptqmodel,
            (sym or not v1 or _known_producer(config), "it takes asymmetric v1 files only from itself; use gptq_v2"),
        ),
        "vLLM (Marlin kernels)": (
            (bits in (4, 8), f"{bits}-bit weights; Marlin has 4 and 8"),
            (sym, "zero points are not symmetric"),
            (
                group in MARLIN_GROUPS and not ragged,
                f"group {group}; Marlin has {_listed(MARLIN_GROUPS)}, dividing the inputs",
            ),
            (tiles, "outputs must be multiples of 64 and inputs of 128"),
        ),
        "ExLlamaV2": (
            (bits == 4, f"{bits}-bit weights; its GPTQ kernel has 4"),
            (group in EXLLAMA_GROUPS, f"group {group}; it has whole rows and powers of two from 32"),
            (v1, "it reads format gptq_v2 as v1: every zero point off by one"),
        ),
    }
    verdicts = []
    for name, conditions in rules.items():
        faults = [text for holds, text in conditions if not holds]
        why = "; ".join([*filter(None, [UNREAD.get((name, model_type))]), *faults])
        verdicts.append(Runtime(name, not why, why))
    return verdicts


def _fits_int4(group, shapes) -> bool:
    """Whether torch's 4-bit CPU operator takes every linear; a whole row is a group of all its inputs."""
    columns = [(inputs, inputs if group == -1 else group) for _, inputs in shapes]
    return all(width in INT4_COLUMNS and inputs % width == 0 for inputs, width in columns)


def _known_producer(config) -> bool:
    """Whether meta.quantizer holds "gptqmodel:X" with X from 0.9.0 on, which GPTQModel asks of asymmetric v1 files."""
    producers = dict(entry.split(":") for entry in config["meta"]["quantizer"])
    return tuple(map(int, producers.get("gptqmodel", "0").split("."))) >= (0, 9)


def _listed(groups) -> str:
    return ", ".join(map(str, groups))

"""Which programs load a GPTQ folder, and why the others do not.

The rules read what the loaders read: the written quantization_config and the shapes of the linears. They are those of
GPTQModel 7.6 and transformers 5.23 on a CPU, vLLM's Marlin layer and ExLlamaV2; docs/formats.md says which were tried
here and which stand on a runtime's source alone. Whether a runtime knows the architecture is not looked at.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from ptq.export.gptq import quantization_config

GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
MARLIN_GROUPS = (-1, 32, 64, 128)
EXLLAMA_GROUPS = (-1, 32, 64, 128, 256, 512, 1024)
INT4_GROUPS = (16, 32, 64, 128)  # of GPTQModel's default 4-bit CPU kernel; others fall to a kernel that takes them all


@dataclass(frozen=True)
class Runtime:
    """A runtime's verdict; `why` is empty if it loads the file."""

    name: str
    loads: bool
    why: str

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


def runtimes(spec, shapes: Iterable[tuple[int, int]]) -> list[Runtime]:
    """Verdicts for a checkpoint.

    Args:
        spec: QuantSpec.
        shapes: (O, I) of the quantized linears.
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
            not (bits == 4 and ragged and group in INT4_GROUPS),
            f"its default 4-bit CPU kernel fails at the first forward where group {group} does not divide the inputs",
        ),
    )
    rules = {
        "transformers + GPTQModel": gptqmodel,
        "GPTQModel": (
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
        why = "; ".join(text for holds, text in conditions if not holds)
        verdicts.append(Runtime(name, not why, why))
    return verdicts


def _known_producer(config) -> bool:
    """Whether meta.quantizer holds "gptqmodel:X" with X from 0.9.0 on, which GPTQModel asks of asymmetric v1 files."""
    producers = dict(entry.split(":") for entry in config["meta"]["quantizer"])
    return tuple(map(int, producers.get("gptqmodel", "0").split("."))) >= (0, 9)


def _listed(groups) -> str:
    return ", ".join(map(str, groups))

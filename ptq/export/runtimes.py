"""Which programs load a GPTQ folder, and why the others do not.

The rules are those of the runtimes' own loaders (GPTQModel 7.6, vLLM's gptq and gptq_marlin layers, exllamav2);
docs/formats.md says which combinations were tried here.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from ptq.export.gptq_tensors import packed_bits


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
    bits, v2 = packed_bits(spec.bits), spec.checkpoint_format == "gptq_v2"
    sym = spec.sym and spec.bits > 1
    ragged = spec.group_size != -1 and any(inputs % spec.group_size for _, inputs in shapes)
    group = spec.group_size in (-1, 32, 64, 128)
    tiles = all(outputs % 64 == 0 and inputs % 128 == 0 for outputs, inputs in shapes)
    rules = {
        "transformers + GPTQModel": ((not ragged, "a group does not divide the inputs of every linear"),),
        "vLLM (Marlin kernels)": (
            (bits in (4, 8), f"{bits}-bit weights; Marlin has 4 and 8"),
            (sym, "zero points are not symmetric"),
            (group and not ragged, f"group {spec.group_size}; Marlin has -1, 32, 64 and 128, dividing the inputs"),
            (tiles, "outputs must be multiples of 64 and inputs of 128"),
            (not v2, "format gptq_v2 is not accepted"),
        ),
        "ExLlamaV2": (
            (bits == 4, f"{bits}-bit weights; its GPTQ kernel has 4"),
            (not ragged, "a group does not divide the inputs of every linear"),
            (not v2, "format gptq_v2 is not read"),
        ),
    }
    verdicts = []
    for name, conditions in rules.items():
        why = "; ".join(text for holds, text in conditions if not holds)
        verdicts.append(Runtime(name, not why, why))
    return verdicts

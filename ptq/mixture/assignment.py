"""Which types the tensors of a model may have: what fits their rows, what a recipe says.

Rows that do not fill a type's blocks get the nearest type that has shorter ones.
"""

from collections.abc import Iterable, Mapping

from calibration.errors import InputError
from ptq.export.gguf.metadata import architecture_of
from ptq.export.gguf.tensors import TensorNames
from ptq.export.gguf.types import BY_NAME
from ptq.mixture.recipes import Recipe

NARROWER = {  # for rows that do not fill a type's blocks, the nearest types that have shorter ones
    "Q1_0": "Q2_0", "Q2_K": "Q2_0", "TQ1_0": "Q2_0", "TQ2_0": "Q2_0", "Q2_0": "IQ4_NL", "Q3_K": "IQ4_NL",
    "IQ4_XS": "IQ4_NL", "IQ2_XXS": "Q2_0", "IQ2_XS": "Q2_0", "IQ2_S": "Q2_0", "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL",
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
# What --target-bpw and --target-size choose from.
CANDIDATES = (
    "TQ1_0", "TQ2_0", "IQ2_XXS", "Q2_0", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K",
    "Q5_K", "Q6_K", "Q8_0",
)  # fmt: skip


def fitting(ggml_type: str, inputs: int) -> str:
    """The type that rows of so many weights get: this one, or a narrower one whose blocks they fill.

    Raises:
        InputError: No block divides them.
    """
    name = ggml_type
    while inputs % BY_NAME[name].block:
        if name not in NARROWER:
            raise InputError(f"rows of {inputs} weights do not fill the blocks of {ggml_type} or a narrower type")
        name = NARROWER[name]
    return name


def bits_of(ggml_type: str) -> float:
    """Bits a weight of a type."""
    blocks = BY_NAME[ggml_type]
    return 8 * blocks.block_bytes / blocks.block


def candidates(inputs: int, names: Iterable[str] = CANDIDATES) -> tuple[str, ...]:
    """Those of some types that rows of so many weights can have, narrowest first."""
    return tuple(sorted({fitting(name, inputs) for name in names}, key=bits_of))


def recipe_types(recipe: Recipe, config, linears: Iterable[str]) -> Mapping[str, str]:
    """A recipe's type of each linear, by its name in the checkpoint; whether rows fill its blocks is another matter.

    Args:
        recipe: The recipe.
        config: The transformers config of the model.
        linears: Names without ".weight".
    """
    blocks, heads = config.num_hidden_layers, config.num_attention_heads
    names = TensorNames(architecture_of(config), blocks)
    sharing, types = heads // (getattr(config, "num_key_value_heads", None) or heads), {}
    for linear in linears:
        _, block, part, _ = names[f"{linear}.weight"].split(".")
        types[linear] = recipe.type_of(part, int(block), blocks, sharing)
    return types

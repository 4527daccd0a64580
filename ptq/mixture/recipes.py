"""llama.cpp's named mixes as data: which tensors get another type than the mix is named for.

What llama-quantize gives each tensor of a dense model when an importance matrix is at hand (src/llama-quant.cpp,
`llama_tensor_get_type_impl`). Its exceptions for Falcon, for experts and for Llama 2 70B are left out. A tied embedding
counts as the head, a fused q, k, v as v. The mix that llama.cpp calls Q2_K is here for comparisons alone: as a type of
ours, Q2_K is the pure one, all linears alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass

HEAD = "Q6_K"
V, DOWN, ATTENTION_OUT = ("attn_v", "attn_qkv"), ("ffn_down",), ("attn_output",)


@dataclass(frozen=True)
class Rule:
    """A type for tensors of some names in some blocks.

    Attributes:
        parts: Names in the file without block and ".weight".
        ggml_type: What they get.
        blocks: "all"; "first 2", "first 4"; "first 1/8", "first 1/16"; or "ends", the first and the last eighth and
            every third block between.
        shared: Only where at least four query heads share a key-value head.
    """

    parts: tuple[str, ...]
    ggml_type: str
    blocks: str = "all"
    shared: bool = False

    def covers(self, part: str, block: int, blocks: int, sharing: int) -> bool:
        """Whether the tensor `part` of a block of a model with so many query heads a key-value head is meant."""
        return part in self.parts and (sharing >= 4 or not self.shared) and _is_among(self.blocks, block, blocks)


@dataclass(frozen=True)
class Recipe:
    """The type of most linears (and of a separate embedding), and rules of which the first that covers one counts."""

    ggml_type: str
    rules: tuple[Rule, ...] = ()

    def type_of(self, part: str, block: int, blocks: int, sharing: int) -> str:
        """The type of one linear; arguments as of Rule.covers."""
        covering = (r.ggml_type for r in self.rules if r.covers(part, block, blocks, sharing))
        return next(covering, self.ggml_type)


RECIPES: Mapping[str, Recipe] = {
    "Q2_K_S": Recipe("Q2_K", (Rule(V, "Q4_K", shared=True), Rule(DOWN, "Q4_K", "first 1/8"))),
    "Q2_K": Recipe("Q2_K", (Rule(V, "Q4_K", shared=True), Rule(V + DOWN + ATTENTION_OUT, "Q3_K"))),
    "Q3_K_S": Recipe("Q3_K"),
    "Q3_K_M": Recipe(
        "Q3_K",
        (Rule(V, "Q5_K", "first 2"), Rule(DOWN, "Q5_K", "first 1/16"), Rule(V + DOWN + ATTENTION_OUT, "Q4_K")),
    ),
    "Q3_K_L": Recipe("Q3_K", (Rule(V + DOWN + ATTENTION_OUT, "Q5_K"),)),
    "Q4_K_S": Recipe("Q4_K", (Rule(V, "Q5_K", "first 4"), Rule(DOWN, "Q5_K", "first 1/8"))),
    "Q4_K_M": Recipe("Q4_K", (Rule(V + DOWN, "Q6_K", "ends"),)),
    "Q5_K_S": Recipe("Q5_K"),
    "Q5_K_M": Recipe("Q5_K", (Rule(V + DOWN, "Q6_K", "ends"),)),
}
MIXES = tuple(name for name in RECIPES if name != "Q2_K")  # names that are no type's as well


def _is_among(which, block, blocks):
    if which == "all":
        return True
    if which == "ends":
        return block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
    count, _, share = which.removeprefix("first ").partition("/")
    return block < (blocks // int(share) if share else int(count))

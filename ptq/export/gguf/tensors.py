"""Names and row orders of a model's tensors in a GGUF file.

llama.cpp turns neighbours of a head's rotated columns where Llama's checkpoints turn its two halves, so rows of q and k
are stored interleaved; GPT-NeoX's fused rows come head by head and are stored q, then k, then v. Both move whole rows:
quantized rows move with their bytes.
"""

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

from calibration.errors import InputError
from ptq.families.gguf import GgufArchitecture

NOT_STORED = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
_ARCHITECTURES = {name: number for number, name in MODEL_ARCH_NAMES.items()}


class TensorNames:
    """Hugging Face's tensor names in llama.cpp's words.

    Args:
        architecture: llama.cpp's architecture.
        blocks: Number of decoder blocks.
    """

    def __init__(self, architecture: GgufArchitecture, blocks: int):
        number: MODEL_ARCH = _ARCHITECTURES[architecture.name]
        self._map, self._name = get_tensor_name_map(number, blocks), architecture.name

    def __getitem__(self, name: str) -> str:
        """The name in the file, such as "blk.0.attn_q.weight".

        Raises:
            InputError: llama.cpp's architecture has no such tensor.
        """
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"{name}: llama.cpp's {self._name} has no such tensor")
        return found


def row_order(architecture: GgufArchitecture, name: str, heads: int, kv_heads: int, rows: int) -> np.ndarray | None:
    """Which row of the checkpoint each row of the file is, (rows,); None where the order is the same.

    Args:
        architecture: llama.cpp's architecture.
        name: Name in the file.
        heads: Attention heads.
        kv_heads: Key and value heads.
        rows: Rows of the tensor, or entries of a bias.
    """
    part = name.rpartition(".")[0].rpartition(".")[2]
    if architecture.permuted and part in ("attn_q", "attn_k"):
        halves = (heads if part == "attn_q" else kv_heads, 2, -1)
    elif architecture.interleaved and part == "attn_qkv":
        return np.arange(rows).reshape(heads, 3, -1).swapaxes(0, 1).reshape(-1)
    else:
        return None
    return np.arange(rows).reshape(halves).swapaxes(1, 2).reshape(-1)


def is_norm(name: str) -> bool:
    """Whether a tensor of the file holds the weights of a norm."""
    return name.endswith("_norm.weight")


def stays_float32(name: str, dimensions: int) -> bool:
    """Whether llama.cpp wants a tensor in F32 whatever the rest of the file is in."""
    return dimensions == 1 or name == "position_embd.weight"

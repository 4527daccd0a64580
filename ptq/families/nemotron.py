"""Nemotron (dense), Arcee and Apertus: Llama's attention, and an MLP without gate.

Nemotron rotates half of each head, and its LayerNorms multiply by 1 + weight; Apertus has norms on q and k.
"""

from ptq.families.family import Fold, ModelFamily

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_STAGES = (_QKV, ("self_attn.o_proj",), ("mlp.up_proj",), ("mlp.down_proj",))
_VALUES = Fold("self_attn.v_proj", ("self_attn.o_proj",), "kv_head")

NEMOTRON = ModelFamily(
    name="nemotron",
    model_types=("nemotron",),
    blocks="model.layers",
    stages=_STAGES,
    folds=(Fold("input_layernorm", _QKV), _VALUES, Fold("post_attention_layernorm", ("mlp.up_proj",))),
    norm_offset=1.0,
)
ARCEE = ModelFamily(
    name="arcee",
    model_types=("arcee",),
    blocks="model.layers",
    stages=_STAGES,
    folds=(
        Fold("input_layernorm", _QKV),
        _VALUES,
        Fold("self_attn.q_proj", ("self_attn.k_proj",), "rotary"),
        Fold("post_attention_layernorm", ("mlp.up_proj",)),
    ),
)
APERTUS = ModelFamily(
    name="apertus",
    model_types=("apertus",),
    blocks="model.layers",
    stages=_STAGES,
    folds=(Fold("attention_layernorm", _QKV), _VALUES, Fold("feedforward_layernorm", ("mlp.up_proj",))),
)

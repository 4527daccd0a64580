"""Gemma: Llama's linears and norms of 1 + weight; since Gemma 2 a norm on both sides of each half.

Gemma 3 is its text model. Since Gemma 2 blocks alternate between a sliding window and full attention, so masks (and in
Gemma 3 rotary tables) differ by block.
"""

from ptq.families.family import Fold, ModelFamily

_QKV, _GATE_UP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
_STAGES = (_QKV, ("self_attn.o_proj",), _GATE_UP, ("mlp.down_proj",))


def _folds(mlp_norm):
    return (
        Fold("input_layernorm", _QKV),
        Fold("self_attn.v_proj", ("self_attn.o_proj",), "kv_head"),
        Fold(mlp_norm, ("mlp.up_proj", "mlp.gate_proj")),
        Fold("mlp.up_proj", ("mlp.down_proj",)),
    )


GEMMA = ModelFamily(
    name="gemma",
    model_types=("gemma",),
    blocks="model.layers",
    stages=_STAGES,
    folds=_folds("post_attention_layernorm"),
    norm_offset=1.0,
)
GEMMA2 = ModelFamily(
    name="gemma2",
    model_types=("gemma2", "gemma3_text"),
    blocks="model.layers",
    stages=_STAGES,
    folds=_folds("pre_feedforward_layernorm"),
    norm_offset=1.0,
)

"""Stages and folds that many decoders have under the same names, to put families together from."""

from ptq.families.family import Fold

QKV, GATE_UP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
ATTENTION = (QKV, ("self_attn.o_proj",))
DOWN = ("mlp.down_proj",)
GATED = (*ATTENTION, GATE_UP, DOWN)  # an MLP with a gate
UNGATED = (*ATTENTION, ("mlp.up_proj",), DOWN)

NORM_TO_QKV = Fold("input_layernorm", QKV)
VALUES = Fold("self_attn.v_proj", ("self_attn.o_proj",), "kv_head")
ROTARY = Fold("self_attn.q_proj", ("self_attn.k_proj",), "rotary")  # halves of a head turned, with no norm between
NORM_TO_GATED = Fold("post_attention_layernorm", ("mlp.up_proj", "mlp.gate_proj"))
NORM_TO_UNGATED = Fold("post_attention_layernorm", ("mlp.up_proj",))
UP_TO_DOWN = Fold("mlp.up_proj", DOWN)

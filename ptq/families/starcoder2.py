"""StarCoder2: Llama's attention and an MLP without gate, biases in all linears, LayerNorms."""

from ptq.families.family import Fold, ModelFamily
from ptq.families.parts import ATTENTION, NORM_TO_QKV, ROTARY, VALUES

STARCODER2 = ModelFamily(
    name="starcoder2",
    model_types=("starcoder2",),
    blocks="model.layers",
    stages=(*ATTENTION, ("mlp.c_fc",), ("mlp.c_proj",)),
    folds=(NORM_TO_QKV, VALUES, ROTARY, Fold("post_attention_layernorm", ("mlp.c_fc",))),
)

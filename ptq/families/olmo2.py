"""OLMo 2 and 3, and EXAONE 4: Llama's linears with norms behind attention and MLP, none before, and norms on q and k.

In OLMo 3 and EXAONE 4 some blocks have a sliding window.
"""

from ptq.families.family import Fold, ModelFamily

OLMO2 = ModelFamily(
    name="olmo2",
    model_types=("olmo2", "olmo3", "exaone4"),
    blocks="model.layers",
    stages=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    folds=(
        Fold("self_attn.v_proj", ("self_attn.o_proj",), "kv_head"),
        Fold("mlp.up_proj", ("mlp.down_proj",)),
    ),
)

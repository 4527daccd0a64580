"""What llama.cpp calls and computes for each architecture, as data, read in both directions.

A GGUF file stores the numbers of config.json under llama.cpp's names (`keys`). The rest of an architecture is code in
llama.cpp: what it fixes there (`fixed`, `activations`) a model must agree with, or the file would stand for another
model.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GgufKey:
    """One number of the metadata.

    Attributes:
        key: Its name after "<architecture>.".
        name: The attribute of the transformers config.
        kind: int, float or bool; an int is stored as uint32.
        shapes: It is a length of some tensor, so no file needs it larger than its longest one.
        unset: What the file says where the config says None; None: the config may not.
        default: What llama.cpp takes where the file says nothing.
    """

    key: str
    name: str
    kind: type = int
    shapes: bool = True
    unset: int | float | None = None
    default: int | float | bool | None = None


@dataclass(frozen=True)
class GgufArchitecture:
    """An architecture of llama.cpp.

    Attributes:
        name: llama.cpp's word, in general.architecture.
        model_type: The transformers model that a file of it is read as.
        keys: What config.json says and the file stores.
        fixed: (attribute, value) of the config that llama.cpp takes for granted.
        activations: The values of the activation attribute that it computes.
        activation: Name of that attribute.
        rope: Whether positions are rotary.
        permuted: Rows of q and k are stored with the two halves of each head interleaved.
        interleaved: Fused q, k, v come head by head and are stored q, then k, then v.
        norm_offset: Added to the weights of RMS norms.
        biases: (attribute, tensor of block 0 whose presence says it).
        window_period: Every so many blocks one has full attention, the others a sliding window; 0: no windows.
        wide_scale_blocks: With so many blocks, q is scaled by hidden_size / heads instead of the head's width.
        separate_head: Whether a head apart from the embedding can be stored.
        unturned_period: Every so many blocks one has no rotary positions; 0: all have.
        unwindowed: A sliding window that the model has is not computed: the context ends where it begins to matter.
    """

    name: str
    model_type: str
    keys: tuple[GgufKey, ...]
    fixed: tuple[tuple[str, object], ...] = ()
    activations: tuple[str, ...] = ("silu", "swish")
    activation: str = "hidden_act"
    rope: bool = True
    permuted: bool = False
    interleaved: bool = False
    norm_offset: float = 0.0
    biases: tuple[tuple[str, str], ...] = ()
    window_period: int = 0
    wide_scale_blocks: int = 0
    separate_head: bool = True
    unturned_period: int = 0
    unwindowed: bool = False


_SIZES = (
    GgufKey("context_length", "max_position_embeddings", shapes=False),
    GgufKey("embedding_length", "hidden_size"),
    GgufKey("block_count", "num_hidden_layers"),
    GgufKey("feed_forward_length", "intermediate_size"),
    GgufKey("attention.head_count", "num_attention_heads"),
)
_GPT_SIZES = (
    GgufKey("context_length", "n_positions"),
    GgufKey("embedding_length", "n_embd"),
    GgufKey("block_count", "n_layer"),
    GgufKey("feed_forward_length", "n_inner"),
    GgufKey("attention.head_count", "n_head"),
    GgufKey("attention.layer_norm_epsilon", "layer_norm_epsilon", float),
)
_KV_HEADS = GgufKey("attention.head_count_kv", "num_key_value_heads")
_RMS_GQA = (
    _KV_HEADS,
    GgufKey("attention.layer_norm_rms_epsilon", "rms_norm_eps", float),
)
_HEAD_WIDTH = (GgufKey("attention.key_length", "head_dim"), GgufKey("attention.value_length", "head_dim"))
_LLAMA_BIASES = (("attention_bias", "attn_q.bias"), ("mlp_bias", "ffn_gate.bias"))
_NO_BIASES = (("attention_bias", False), ("mlp_bias", False))
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh")

LLAMA = GgufArchitecture(
    name="llama",
    model_type="llama",
    keys=(*_SIZES, *_RMS_GQA, *_HEAD_WIDTH),
    permuted=True,
    biases=_LLAMA_BIASES,
    unwindowed=True,  # Mistral's
)
SMOLLM3 = GgufArchitecture(
    name="smollm3",
    model_type="smollm3",
    keys=(*_SIZES, *_RMS_GQA),
    fixed=(*_NO_BIASES, ("use_sliding_window", False)),
    permuted=True,
    unturned_period=4,
)
GRANITE = GgufArchitecture(
    name="granite",
    model_type="granite",
    keys=(
        *_SIZES,
        *_RMS_GQA,
        *_HEAD_WIDTH,
        GgufKey("attention.scale", "attention_multiplier", float),
        GgufKey("embedding_scale", "embedding_multiplier", float, default=1.0),
        GgufKey("residual_scale", "residual_multiplier", float, default=1.0),
        GgufKey("logit_scale", "logits_scaling", float),
    ),
    permuted=True,
    biases=_LLAMA_BIASES,
)
ARCEE = GgufArchitecture(
    name="arcee",
    model_type="arcee",
    keys=(*_SIZES, *_RMS_GQA, *_HEAD_WIDTH),
    fixed=_NO_BIASES,
    activations=("relu2",),
    permuted=True,
)
ERNIE = GgufArchitecture(
    name="ernie4_5",
    model_type="ernie4_5",
    keys=(*_SIZES, *_RMS_GQA, *_HEAD_WIDTH),
    fixed=(("use_bias", False),),
)
SEED_OSS = GgufArchitecture(
    name="seed_oss",
    model_type="seed_oss",
    keys=(*_SIZES, *_RMS_GQA, *_HEAD_WIDTH),
    fixed=(("attention_out_bias", False), ("mlp_bias", False)),
    biases=(("attention_bias", "attn_q.bias"),),
)
OLMO2 = GgufArchitecture(
    name="olmo2",
    model_type="olmo2",
    keys=(*_SIZES, *_RMS_GQA),
    fixed=(("attention_bias", False), ("tie_word_embeddings", False)),
)
NEMOTRON = GgufArchitecture(
    name="nemotron",
    model_type="nemotron",
    keys=(*_SIZES, _KV_HEADS, GgufKey("attention.layer_norm_epsilon", "norm_eps", float)),
    fixed=(("tie_word_embeddings", False),),
    activations=("relu2",),
    norm_offset=1.0,
    biases=(("attention_bias", "attn_q.bias"), ("mlp_bias", "ffn_up.bias")),
)
QWEN2 = GgufArchitecture(
    name="qwen2",
    model_type="qwen2",
    keys=(*_SIZES, *_RMS_GQA),
    fixed=(("use_sliding_window", False),),
)
QWEN3 = GgufArchitecture(
    name="qwen3",
    model_type="qwen3",
    keys=(*_SIZES, *_RMS_GQA, *_HEAD_WIDTH),
    fixed=(("use_sliding_window", False), ("attention_bias", False)),
)
STARCODER = GgufArchitecture(
    name="starcoder",
    model_type="gpt_bigcode",
    keys=(*_GPT_SIZES, _KV_HEADS),
    fixed=(("multi_query", True), ("scale_attn_weights", True)),
    activations=_TANH_GELU,
    activation="activation_function",
    rope=False,
)
STARCODER2 = GgufArchitecture(
    name="starcoder2",
    model_type="starcoder2",
    keys=(*_SIZES, _KV_HEADS, GgufKey("attention.layer_norm_epsilon", "norm_epsilon", float)),
    fixed=(("use_bias", True),),
    activations=_TANH_GELU,
    unwindowed=True,
)
GPT2 = GgufArchitecture(
    name="gpt2",
    model_type="gpt2",
    keys=_GPT_SIZES,
    fixed=(("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)),
    activations=_TANH_GELU,
    activation="activation_function",
    rope=False,
)
GPT_NEOX = GgufArchitecture(
    name="gptneox",
    model_type="gpt_neox",
    keys=(
        *_SIZES,
        GgufKey("attention.layer_norm_epsilon", "layer_norm_eps", float),
        GgufKey("use_parallel_residual", "use_parallel_residual", bool, default=True),
    ),
    fixed=(("attention_bias", True),),
    activations=("gelu", *_TANH_GELU),
    interleaved=True,
)
PHI3 = GgufArchitecture(
    name="phi3",
    model_type="phi3",
    keys=(*_SIZES, *_RMS_GQA, GgufKey("attention.sliding_window", "sliding_window", shapes=False, unset=0, default=0)),
)
GEMMA = GgufArchitecture(
    name="gemma",
    model_type="gemma",
    keys=(*_SIZES, *_RMS_GQA, *_HEAD_WIDTH),
    fixed=(("attention_bias", False),),
    activations=("gelu", *_TANH_GELU),  # computed in its tanh form, whatever the first files' config says
    norm_offset=1.0,
    separate_head=False,
)
GEMMA2 = GgufArchitecture(
    name="gemma2",
    model_type="gemma2",
    keys=(
        *_SIZES,
        *_RMS_GQA,
        *_HEAD_WIDTH,
        GgufKey("attention.sliding_window", "sliding_window", shapes=False, default=4096),
        GgufKey("attn_logit_softcapping", "attn_logit_softcapping", float, default=50.0),
        GgufKey("final_logit_softcapping", "final_logit_softcapping", float, default=30.0),
    ),
    fixed=(("attention_bias", False),),
    activations=_TANH_GELU,
    activation="hidden_activation",
    norm_offset=1.0,
    window_period=2,
    wide_scale_blocks=46,
    separate_head=False,
)
GEMMA3 = GgufArchitecture(
    name="gemma3",
    model_type="gemma3_text",
    keys=(
        *_SIZES,
        *_RMS_GQA,
        *_HEAD_WIDTH,
        GgufKey("attention.sliding_window", "sliding_window", shapes=False),
        GgufKey("final_logit_softcapping", "final_logit_softcapping", float, unset=0.0, default=0.0),
    ),
    fixed=(("attention_bias", False), ("attn_logit_softcapping", None)),
    activations=_TANH_GELU,
    activation="hidden_activation",
    norm_offset=1.0,
    window_period=6,
    wide_scale_blocks=62,
)

_MENU = (
    LLAMA, QWEN2, QWEN3, STARCODER, STARCODER2, GPT2, GPT_NEOX, PHI3, GEMMA, GEMMA2, GEMMA3, SMOLLM3, GRANITE,
    ERNIE, OLMO2, SEED_OSS, ARCEE, NEMOTRON,
)  # fmt: skip

BY_NAME: dict[str, GgufArchitecture] = {architecture.name: architecture for architecture in _MENU}
BY_MODEL_TYPE = {architecture.model_type: architecture for architecture in _MENU} | {"mistral": LLAMA}

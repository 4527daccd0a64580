"""Shapes of real models, as values of their config.json, for checkpoints of random weights."""

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}
_ROPE_3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
SHAPES = {
    "tinyllama-1.1b": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    | {"num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048},
    "llama-2-7b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096},
    "llama-3.2-3b": _LLAMA
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072}
    | {"tie_word_embeddings": True}
    | {"rope_parameters": _ROPE_3 | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
    "starcoderbase-3b": {"model_type": "gpt_bigcode", "multi_query": True, "activation_function": "gelu_pytorch_tanh"}
    | {"n_embd": 2816, "n_inner": 11264, "n_layer": 36, "n_head": 22, "n_positions": 8192, "vocab_size": 49152},
}

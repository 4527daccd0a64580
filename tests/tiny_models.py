"""Tiny random models, one per model_type, written as real Hugging Face folders.

Every quantized input is a multiple of 32 wide. Weights have lognormal column spreads, a few outlier columns and a
low-rank part, so that Hessians are not near the identity; biases and norm weights are off their initial 0 and 1.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

VOCAB = 300
TEXT = "def quantize(weight, bits):\n    return round(weight / scale) * scale\nThe quick brown fox; the lazy dog. " * 8

# Heads wider than hidden / heads (as in the real Qwen3 and Gemma) catch code that derives one from the other.
_ROPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": 256}
_GQA = _ROPE | {"num_key_value_heads": 2}
_GPT = {"n_embd": 64, "n_inner": 128, "n_head": 4, "n_positions": 256}
_GEMMA = _GQA | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}

_WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}

_SIZES = {
    "llama": _GQA,
    "mistral": _GQA | {"sliding_window": None},
    "gpt_bigcode": _GPT,
    "gpt2": _GPT,
    "qwen2": _GQA,
    "qwen3": _GQA | {"head_dim": 32},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_attention_heads": 4}
    | {"max_position_embeddings": 256},
    "gpt_neox": _ROPE,
    "phi3": _GQA | {"original_max_position_embeddings": 256},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma": _GQA | {"head_dim": 32},
    "granite": _GQA
    | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}
    | {"attention_multiplier": 0.2},
    "smollm3": _GQA,
    "seed_oss": _GQA | {"head_dim": 32, "attention_bias": True, "attention_out_bias": False},
    "cwm": _GQA | _WINDOW | {"head_dim": 32},
    "ernie4_5": _GQA | {"head_dim": 32},
    "helium": _GQA | {"head_dim": 16},
    "olmo2": _GQA,
    "olmo3": _GQA | _WINDOW,
    "exaone4": _GQA | _WINDOW | {"head_dim": 32},
    "glm": _GQA | {"head_dim": 16},
    "glm4": _GQA | {"head_dim": 32},
    "starcoder2": _GQA,
    "nemotron": _GQA,
    "arcee": _GQA,
    "apertus": _GQA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}


def make_tiny(model_type, folder, *, dtype="float32", blocks=2, shards=1, seed=0, tie=None, **sizes) -> Path:
    """Write a model, its tokenizer and its configs to `folder`.

    Args:
        model_type: A key of `_SIZES`.
        folder: Where to write; made if absent.
        dtype: Name of the torch dtype of the weights in the file.
        blocks: Number of decoder blocks; Gemma alternates sliding-window and full-attention ones.
        shards: With more than one, the file is split into at least so many, with an index.
        seed: Seed of the weights.
        tie: Whether lm_head shares the embedding; None leaves the family's default.
        sizes: Values of the config that replace those of `_SIZES`.
    """
    folder = Path(folder)
    config = AutoConfig.for_model(model_type, **(_config_values(model_type, blocks, tie) | sizes))
    model = AutoModelForCausalLM.from_config(config).eval()
    _fill(model, torch.Generator().manual_seed(seed))
    model = model.to(getattr(torch, dtype))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size="1GB" if shards == 1 else size // shards)
    train_tokenizer().save_pretrained(folder)
    return folder


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly VOCAB tokens, the same in every run."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=specials, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _config_values(model_type, blocks, tie):
    values = _SIZES[model_type] | {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    values["n_layer" if model_type in ("gpt2", "gpt_bigcode") else "num_hidden_layers"] = blocks
    if model_type in ("gemma2", "gemma3_text"):
        values["layer_types"] = [("sliding_attention", "full_attention")[i % 2] for i in range(blocks)]
    return values if tie is None else values | {"tie_word_embeddings": tie}


def _fill(model, generator):
    conv = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            # Added to the initial 0 or 1, which is right for norms that store weight - 1 too.
            parameter.data.add_(0.2 * noise)
        else:
            weight = _realistic(noise.T if id(parameter) in conv else noise, generator)
            parameter.data.copy_(weight.T if id(parameter) in conv else weight)


def _realistic(noise, generator):
    """(O, I) noise with a low-rank part, uneven columns and three outlier columns."""
    O, I = noise.shape
    low_rank = torch.randn(O, 4, generator=generator) @ torch.randn(4, I, generator=generator) / 2
    columns = torch.exp(0.3 * torch.randn(I, generator=generator))
    columns[torch.randperm(I, generator=generator)[:3]] *= 4
    return 0.7 * (noise + 0.5 * low_rank) * columns / I**0.5

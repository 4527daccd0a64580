"""GGUF files of every family: llama.cpp computes with them what Hugging Face computes, and they read back unchanged."""

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, Keys, quants
from llama_client import open_llama
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from calibration.errors import InputError
from ptq.checkpoint import open_checkpoint
from ptq.export.gguf.layout import HEAD, EncodedTensor
from ptq.export.gguf.types import Q2_0, dequantize
from ptq.export.gguf.writer import write_gguf
from ptq.families import FAMILIES, family_of
from ptq.families.gguf import BY_MODEL_TYPE, BY_NAME
from ptq.gguf.config import read_config
from ptq.gguf.file import GgufFile
from ptq.gguf.weights import GgufCheckpoint
from ptq.reload import load_tokenizer

WEIGHTS = "model.safetensors"
UNWRITTEN = {"opt", "cwm", "helium", "olmo3", "exaone4", "glm", "glm4", "apertus"}
ROPE = {"rope_theta": 10000.0}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
# name: model_type and what differs from the tiny model's config
CASES = {
    **{model_type: (model_type, {}) for model_type in FAMILIES if model_type not in UNWRITTEN | {"phi3"}},
    "smollm3-deep": ("smollm3", {"blocks": 5}),
    "granite-biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "nemotron-biases": ("nemotron", {"attention_bias": True, "mlp_bias": True}),
    "phi-plain": ("phi3", {}),  # not "phi3": llama.cpp would look for that model's special tokens
    "phi-partial": ("phi3", {"rope_parameters": ROPE | {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "phi-longrope": (
        "phi3",
        {
            "rope_parameters": ROPE
            | {"rope_type": "longrope", "long_factor": [1.5 + i / 4 for i in range(8)], "short_factor": [1.0] * 8},
            "original_max_position_embeddings": 64,
        },
    ),
    "llama-3": (
        "llama",
        {
            "rope_parameters": ROPE
            | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 64}
        },
    ),
    "llama-linear": ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "llama-yarn": (
        "llama",
        {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "qwen2-yarn": (
        "qwen2",
        {
            "rope_parameters": ROPE
            | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3}
        },
    ),
    "gemma3-linear": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": LOCAL,
            }
        },
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-wide": ("llama", {"head_dim": 32}),
    "neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
}
TOKENS = torch.randint(2, 300, (1, 100), generator=torch.Generator().manual_seed(1))
# F32 throughout, summed in another order: 1e-6 was seen. llama.cpp looks GELU up by fp16 inputs (2^-11 relative) and
# takes its tanh form where GPT-NeoX has the exact one: 2.6e-4 was seen.
TOLERANCE = {"silu": 5e-6, "gelu": 1e-3}


def make_case(name, folder):
    """The tiny model of a case."""
    model_type, changes = CASES[name]
    return make_tiny(model_type, folder, **changes)


def write(path, source, encoded=None, **options):
    options = {"float_type": "F32", "tokenizer": load_tokenizer(source)} | options
    config = AutoConfig.from_pretrained(source)
    write_gguf(path, open_checkpoint(source), encoded or {}, config=config, **options)
    return path


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits[0]


def original(source):
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


def restored(path):
    """Hugging Face's model with nothing but the file's metadata and weights."""
    weights = GgufCheckpoint(path)
    config = weights.model_config()
    config.dtype = torch.float32
    state = weights.read(weights.names())
    model = AutoModelForCausalLM.from_config(config)
    missing = set(model.load_state_dict(state, strict=False).missing_keys)
    assert missing <= ({HEAD} if config.tie_word_embeddings else set())
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    source = make_case(request.param, folder / request.param)
    return source, write(folder / "model.gguf", source)


def test_llama_cpp_computes_the_same(case):
    source, path = case
    llama = open_llama(path)
    expected, computed = logits(original(source)).numpy(), llama.logits(TOKENS[0].tolist())
    llama.close()
    assert llama.warnings == ""
    config = AutoConfig.from_pretrained(source)
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", "gelu")
    bound = TOLERANCE["silu" if activation == "silu" else "gelu"]
    assert np.linalg.norm(computed - expected) <= bound * np.linalg.norm(expected)


def test_the_file_reads_back_as_the_model(case):
    source, path = case
    ours, weights = original(source).state_dict(), GgufCheckpoint(path)
    for name, tensor in weights.read(weights.names()).items():
        assert tensor.shape == weights.shape(name)
        # A norm stored with 1 added was rounded once more.
        assert torch.allclose(tensor, ours[name], rtol=0, atol=2**-23 if "norm" in name else 0), name
    # Only a frequency that comes back by way of its factor, and epsilon as fp32, differ in the last bit.
    assert torch.allclose(logits(restored(path)), logits(original(source)), rtol=1e-5, atol=5e-5)


def test_keys_that_files_of_others_lack(case):
    """llama.cpp has defaults for many keys; a config read without them must be the same where they say the default."""
    _, path = case
    file = GgufFile(path)
    name, whole = file.metadata["general.architecture"], read_config(file)
    optional = ["vocab_size", "rope.dimension_count", "use_parallel_residual", "final_logit_softcapping",
                "attn_logit_softcapping", "rope.freq_base_swa"]  # fmt: skip
    optional += ["rope.scaling.type"] * (whole.get("rope_parameters", {}).get("rope_type") == "longrope")
    heads = file.metadata[f"{name}.attention.head_count"]
    if whole.get("head_dim") == whole.get("hidden_size", 0) // heads:
        optional += ["attention.key_length", "attention.value_length"]
    defaults = {"use_parallel_residual": True, "rope.dimension_count": whole.get("head_dim", 64 // heads)}
    for key in optional:
        if key not in defaults or file.metadata.get(f"{name}.{key}") == defaults[key]:
            file.metadata.pop(f"{name}.{key}", None)
    assert read_config(file) == whole


def encode(source, number, encoder):
    """Every linear, embedding and head in a type; and the values that stand in the file, by the model's names."""
    encoded, values = {}, {}
    checkpoint = open_checkpoint(source)
    transposed = family_of(checkpoint.config).transposed
    for name, tensor in checkpoint.read(checkpoint.names()).items():
        if tensor.dim() == 2 and "wpe" not in name:
            flips = transposed and "wte" not in name
            rows = encoder((tensor.T if flips else tensor).numpy())
            decoded = torch.from_numpy(dequantize(rows, number))
            encoded[name] = EncodedTensor(number, lambda content=rows: content.tobytes())
            values[name.replace("embed_out", "lm_head")] = decoded.T if flips else decoded
    return encoded, values


def to_q2_0(matrix):
    """Random codes, and for each block the scale that makes its largest weight 2 d."""
    blocks = matrix.reshape(len(matrix), -1, 64)
    d = (abs(blocks).max(axis=-1, keepdims=True) / 2).astype(np.float16)
    codes = np.clip(np.round(blocks / d.astype(np.float32)) + 1, 0, 3).astype(np.uint8)
    packed = (codes.reshape(*codes.shape[:2], 16, 4) << np.array([0, 2, 4, 6], np.uint8)).sum(axis=-1, dtype=np.uint8)
    return np.concatenate([d.view(np.uint8), packed], axis=-1).reshape(len(matrix), -1)


@pytest.mark.parametrize(
    ("number", "encoder", "tolerance"),
    # llama.cpp rounds activations to 8 bits before it multiplies with these types.
    [(8, lambda matrix: quants.quantize(matrix, GGMLQuantizationType.Q8_0), 3e-2), (Q2_0, to_q2_0, 3e-2)],
    ids=["Q8_0", "Q2_0"],
)
@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen2", "gpt_bigcode", "gpt2", "gpt_neox", "phi-plain"])
def test_encoded_rows_keep_their_bytes_and_their_places(tmp_path, name, number, encoder, tolerance):
    source = make_case(name, tmp_path / name)
    encoded, values = encode(source, number, encoder)
    path = write(tmp_path / "model.gguf", source, encoded)
    weights = GgufCheckpoint(path)
    for tensor in values:
        assert torch.equal(weights.read([tensor])[tensor], values[tensor]), tensor
    reference = original(source)
    reference.load_state_dict(values, strict=False)
    llama, expected = open_llama(path), logits(reference).numpy()
    difference = llama.logits(TOKENS[0].tolist()) - expected
    llama.close()
    assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_tied_model_may_get_a_head_of_its_own(tmp_path, model_type):
    source = make_tiny(model_type, tmp_path / model_type, tie=True)
    state = original(source).state_dict()
    rows = quants.quantize(2 * state[HEAD].numpy(), GGMLQuantizationType.Q8_0)
    path = write(tmp_path / "model.gguf", source, {HEAD: EncodedTensor(8, rows.tobytes)})
    weights = GgufCheckpoint(path)
    assert not weights.config["tie_word_embeddings"]
    assert torch.equal(weights.read([HEAD])[HEAD], torch.from_numpy(dequantize(rows, 8)))
    llama, expected = open_llama(path), logits(original(source)).numpy()
    doubled = llama.logits(TOKENS[0].tolist()) / 2
    llama.close()
    assert np.linalg.norm(doubled - expected) <= 3e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize(("float_type", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_floats_are_rounded_once_and_vectors_stay_whole(tmp_path, float_type, dtype):
    source = make_tiny("gpt2", tmp_path / "source")
    weights = GgufCheckpoint(write(tmp_path / "model.gguf", source, float_type=float_type))
    ours = original(source).state_dict()
    for name, tensor in weights.read(weights.names()).items():
        exact = tensor.dim() == 1 or "wpe" in name
        assert torch.equal(tensor, ours[name] if exact else ours[name].to(dtype).float()), name


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("opt", {}, "model_type 'opt'"),
        ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\]"),
        ("seed_oss", {"attention_out_bias": True}, "attention_out_bias is True"),
        ("nemotron", {"head_dim": 32}, "head_dim is 32; llama.cpp's nemotron computes with 16"),
        ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "use_sliding_window is True"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is None"),
        ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar is 16"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        (
            "llama",
            {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}
             | {"original_max_position_embeddings": 64}},
            "beta_fast is 16",
        ),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_compute_is_refused(tmp_path, model_type, changes, words):
    source = make_tiny(model_type, tmp_path / "source", **changes)
    with pytest.raises(InputError, match=words):
        write(tmp_path / "model.gguf", source)
    assert not list(tmp_path.glob("model.gguf*"))


def test_the_name_of_phi3_promises_its_tokens(tmp_path):
    source = make_tiny("phi3", tmp_path / "my-phi3")
    with pytest.raises(InputError, match="rename its folder"):
        write(tmp_path / "model.gguf", source)
    write(tmp_path / "model.gguf", source.rename(tmp_path / "mini"))


@pytest.mark.parametrize("model_type", ["mistral", "starcoder2"])
def test_a_sliding_window_that_llama_cpp_lacks_bounds_the_context(tmp_path, model_type):
    source = make_tiny(model_type, tmp_path / "source", sliding_window=16)
    assert GgufCheckpoint(write(tmp_path / "model.gguf", source)).config["max_position_embeddings"] == 16


def test_weights_beyond_f16_and_rows_that_fill_no_block_are_refused(tmp_path):
    source = make_tiny("llama", tmp_path / "source")
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(InputError, match=f"{name} has 64 inputs; Q4_K wants a multiple of 256"):
        write(tmp_path / "model.gguf", source, {name: EncodedTensor(12, bytes)})
    short = EncodedTensor(8, lambda: bytes(34))
    with pytest.raises(InputError, match="34 bytes where Q8_0"):
        write(tmp_path / "model.gguf", source, {name: short})
    assert not list(tmp_path.glob("model.gguf*"))
    state = original(source)
    state.model.layers[1].mlp.up_proj.weight.data[3, 5] = 1e5
    state.save_pretrained(source)
    with pytest.raises(InputError, match="F16 cannot"):
        write(tmp_path / "model.gguf", source, float_type="F16")
    write(tmp_path / "model.gguf", source, float_type="BF16")


def test_the_table_speaks_the_package_s_words():
    groups = [value for value in vars(Keys).values() if isinstance(value, type)]
    known = {value for group in groups for value in vars(group).values() if isinstance(value, str)}
    for architecture in BY_NAME.values():
        assert architecture.name in MODEL_ARCH_NAMES.values()
        assert all("{arch}." + key.key in known for key in architecture.keys)
    assert set(BY_MODEL_TYPE) == set(FAMILIES) - UNWRITTEN


def test_names_and_buffers_of_hub_files(tmp_path):
    """GPT-2's own files leave out the base model's prefix and hold the causal mask."""
    source = make_tiny("gpt2", tmp_path / "source")
    path = write(tmp_path / "model.gguf", source)
    state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(source / WEIGHTS).items()}
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256) for i in range(2)}
    state |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    save_file(state, source / WEIGHTS, metadata={"format": "pt"})
    ours, theirs = (GgufCheckpoint(file) for file in (path, write(tmp_path / "hub.gguf", source)))
    assert all(torch.equal(ours.read([name])[name], theirs.read([name])[name]) for name in ours.names())
    assert set(ours.file.tensors) == set(theirs.file.tensors)


def test_the_model_card_gives_the_general_keys(tmp_path):
    source = make_tiny("llama", tmp_path / "Tiny-Llama-1B-v2")
    (source / "README.md").write_text("---\nlicense: mit\ntags: [code]\nbase_model: someone/Base-1B\n---\nA card.\n")
    metadata = GgufCheckpoint(write(tmp_path / "model.gguf", source)).file.metadata
    assert (metadata["general.name"], metadata["general.license"]) == ("Tiny Llama 1B v2", "mit")
    assert metadata["general.base_model.0.name"] == "Base 1B" and metadata["general.tags"] == ["code"]
    (source / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(InputError, match="README.md: the head of the model card"):
        write(tmp_path / "model.gguf", source)


def test_the_same_model_gives_the_same_bytes(tmp_path):
    source = make_tiny("llama", tmp_path / "source")
    first, second = (write(tmp_path / name, source, extra={"quantize.x": 3}) for name in ("a.gguf", "b.gguf"))
    assert first.read_bytes() == second.read_bytes()
    assert GgufCheckpoint(first).file.metadata["quantize.x"] == 3

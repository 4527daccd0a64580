"""Beside llama.cpp's own converter: the same tensors byte for byte, and metadata that differ where it is said why.

convert_hf_to_gguf.py is in the source package of llama-cpp-python, which `make test-peers` unpacks beside the
consumers; `--llama-cpp FOLDER` names another copy. The package brings llama.cpp's test strings and real vocabularies.
"""

import json
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from llama_client import open_llama
from test_gguf_families import CASES, write
from test_gguf_tokenizers import write_model
from tiny_models import make_tiny

from ptq.gguf.file import GgufFile
from ptq.gguf.tokenizer import read_tokenizer
from ptq.reload import load_tokenizer

pytestmark = [pytest.mark.peers, pytest.mark.timeout(900)]

PEERS = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
VOCABULARIES = {  # of a case: in the shared folder, or in the package
    "gpt2": "gpt2", "gpt_neox": "gpt2", "neox-serial": "gpt2", "gpt_bigcode": "starcoder", "qwen2": "qwen2",
    "qwen2-yarn": "qwen2", "qwen3": "qwen2", "llama-3": "llama-bpe", "starcoder2": "starcoder", "olmo2": "gpt2",
    "seed_oss": "qwen2",
}  # fmt: skip
SENTENCEPIECE = "llama2-spm"  # of all other cases: with a tokenizer.model, which the converter wants of them
OLDER_NAMES = {  # what the hub's config.json say and newer transformers leave out, as the converter wants them
    "gpt2": lambda config: {"n_ctx": config["n_positions"]},
    "gpt_neox": lambda config: {
        "rotary_pct": config["rope_parameters"]["partial_rotary_factor"],
        "model_type": "older",  # under the right one transformers reads the config and leaves the name out again
    },
}
CARD = "---\nlicense: mit\ntags: [code]\nlanguage: [en]\n---\nA card.\n"

# "<architecture> <key>", each with its reason in docs/formats.md. Nothing else may differ.
ONLY_OURS = ["* tokenizer.huggingface.json", "* *.vocab_size", "* *.rope.dimension_count", "* *.rope.freq_base",
             "* tokenizer.ggml.add_*_token", "* tokenizer.ggml.add_space_prefix", "* *.rope.scaling.attn_factor",
             "phi3 *.rope.scaling.type", "gemma? *.attention.sliding_window_pattern", "granite *.attention.*_length",
             "gemma3 *.final_logit_softcapping", "gptneox general.file_type"]  # fmt: skip
ONLY_THEIRS = ["gemma tokenizer.ggml.eot_token_id", "nemotron *.attention.*", "nemotron *.rope.scaling.type",
               "nemotron tokenizer.ggml.padding_token_id", "* tokenizer.ggml.add_sep_token",
               "phi3 *.rope.scaling.original_context_length",
               "* *.rope.scaling.yarn_attn_factor"]  # fmt: skip
DIFFERENT = [
    "* tokenizer.ggml.scores",
    "gemma* tokenizer.ggml.add_space_prefix",
    "phi3 tokenizer.ggml.token_type",
    "nemotron tokenizer.ggml.unknown_token_id",
]
NORMAL_END = "'</s>' was not control-type"  # a token of Qwen's that text may hold; its own file is warned of too


@pytest.fixture(scope="module")
def llama_cpp(request) -> Path:
    """llama.cpp's source tree."""
    folder = Path(request.config.getoption("llama_cpp"))
    if not (folder / "convert_hf_to_gguf.py").is_file():
        pytest.skip(f"{folder} holds no convert_hf_to_gguf.py: make test-peers unpacks it")
    return folder


def convert(llama_cpp, source, out) -> Path:
    command = [PEERS if PEERS.exists() else sys.executable, llama_cpp / "convert_hf_to_gguf.py", source]
    command = [*map(str, command), "--outtype", "f32", "--outfile", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def add_vocabulary(name, folder, shared, llama_cpp):
    """Writes a real vocabulary to a folder."""
    if (shared / "tokenizers" / name).is_dir():
        shutil.copytree(shared / "tokenizers" / name, folder, dirs_exist_ok=True)
        return
    tokenizer = read_tokenizer(GgufFile(llama_cpp / "models" / f"ggml-vocab-{name}.gguf"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def make_source(case, folder, shared, llama_cpp) -> Path:
    model_type, changes = CASES[case]
    add_vocabulary(VOCABULARIES.get(case, SENTENCEPIECE), folder, shared, llama_cpp)
    tokenizer = load_tokenizer(folder)
    specials = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = changes | specials | {"vocab_size": len(tokenizer) + -len(tokenizer) % 64}
    sizes |= {"n_inner": None} if model_type in ("gpt2", "gpt_bigcode") else {}
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    make_tiny(model_type, folder, **sizes)
    for path in folder.glob("*token*"):
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text(CARD)
    return folder


def name_as_older(file, model_type):
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | OLDER_NAMES.get(model_type, lambda config: {})(config)))


def same(ours, theirs) -> bool:
    if isinstance(ours, np.ndarray) and isinstance(theirs, np.ndarray):
        return ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    return type(ours) is type(theirs) and ours == theirs


def matches(key, patterns) -> bool:
    return any(fnmatch(key, pattern) for pattern in patterns)


@pytest.mark.parametrize("case", CASES)
def test_the_same_file(tmp_path, shared, llama_cpp, case):
    source = make_source(case, tmp_path / "Tiny-Model-1B-v2", shared, llama_cpp)
    ours = GgufFile(write(tmp_path / "ours.gguf", source))
    name_as_older(source / "config.json", CASES[case][0])
    theirs = GgufFile(convert(llama_cpp, source, tmp_path / "theirs.gguf"))
    problems, architecture = {}, ours.metadata["general.architecture"]
    for key in sorted(ours.metadata.keys() | theirs.metadata.keys()):
        pair = ours.metadata.get(key), theirs.metadata.get(key)
        known = ONLY_OURS if pair[1] is None else ONLY_THEIRS if pair[0] is None else DIFFERENT
        if not same(*pair) and not matches(f"{architecture} {key}", known):
            problems[key] = tuple(str(value)[:80] for value in pair)
    assert not problems, str(problems)
    assert list(ours.tensors) == list(theirs.tensors)
    for name, tensor in ours.tensors.items():
        assert (tensor.shape, tensor.ggml_type) == (theirs.tensors[name].shape, theirs.tensors[name].ggml_type)
        if name == "rope_freqs.weight":
            values = [file.rows(name).view(np.float32) for file in (ours, theirs)]
            np.testing.assert_array_max_ulp(*values, maxulp=1)
        else:
            assert np.array_equal(ours.rows(name), theirs.rows(name)), name
    llama = open_llama(tmp_path / "ours.gguf", n_ctx=64)
    assert all(NORMAL_END in line for line in llama.warnings.splitlines())
    llama.close()


TOLD = ["gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "starcoder"]  # vocabularies with published tokens


@pytest.mark.parametrize("name", TOLD)
def test_the_test_strings_of_llama_cpp(tmp_path, llama_cpp, name):
    """Strings and their tokens by the models' own tokenizers, as llama.cpp publishes them."""
    vocabulary = llama_cpp / "models" / f"ggml-vocab-{name}.gguf"
    strings = Path(f"{vocabulary}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    published = [list(map(int, line.split())) for line in Path(f"{vocabulary}.out").read_text().splitlines()]
    tokenizer = read_tokenizer(GgufFile(vocabulary))
    llama = open_llama(write_model(tmp_path, tokenizer), n_ctx=64)
    assert len(published) > 40
    for text, ids in zip(strings, published, strict=False):  # the last string is empty in some of the files
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
        assert llama.tokenize(text, add_special=False) == ids, text
    llama.close()

"""The tokenizer of a GGUF file: the tokenizer.json in it, or one made of llama.cpp's keys."""

import json

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from calibration.errors import InputError
from ptq.export.gguf.pretokenizers import PRE_TOKENIZERS, to_json
from ptq.export.gguf.vocabulary import SPACE, SPECIALS
from ptq.gguf.file import GgufFile

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5  # kinds of tokens
KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # llama.cpp's spelling
SAME_CUTS = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "smaug-bpe": "dbrx",
    "smollm": "starcoder",
    "deepseek-r1-qwen": "qwen2",
}
MAX_CHARACTERS = 1024  # of a token; ways to cut it are tried one by one


def read_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast | None:
    """A transformers tokenizer; None where the file's is of a kind that is not read here.

    Raises:
        InputError: The keys do not fit together.
    """
    stored = file.metadata.get("tokenizer.huggingface.json")
    content = stored if isinstance(stored, str) else _content(file)
    if content is None:
        return None
    try:
        backend = Tokenizer.from_str(content)
    except Exception as error:  # the library raises its own and Python's
        raise InputError(f"{file.path}: its tokenizer cannot be read ({' '.join(str(error).split())[:160]})") from error
    specials = {f"{name}_token": backend.id_to_token(i) for name in SPECIALS if (i := _special(file, name)) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **specials)


def _content(file) -> str | None:
    """A tokenizer.json from llama.cpp's keys."""
    model, pre = (str(_key(file, name)) for name in ("model", "pre"))
    pre = SAME_CUTS.get(pre, pre)
    if model == "gpt2" and pre in PRE_TOKENIZERS:
        parts = _byte_level(file, pre)
    elif model == "llama":
        parts = _sentencepiece(file)
    else:
        return None
    template = _template(file, adds_bos=model == "llama" or pre == "llama-bpe")
    fixed = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(file)}
    return json.dumps(fixed | parts | {"post_processor": template})


def _byte_level(file, pre) -> dict:
    merges = [merge.split(" ", 1) for merge in _strings(file, "merges")]
    if not all(len(pair) == 2 for pair in merges):
        raise InputError(f"{file.path}: tokenizer.ggml.merges holds what is no pair")
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": to_json(pre),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": _vocab(file),
            "merges": merges,
            "ignore_merges": PRE_TOKENIZERS[pre].ignore_merges,
        },
    }


def _sentencepiece(file) -> dict:
    visible = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if _key(file, "add_space_prefix") is not False else []
    spaces = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown, vocab = _special(file, "unk"), _vocab(file)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, visible]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": _merges(file, vocab),
            "byte_fallback": True,
            "unk_token": None if unknown is None else _strings(file, "tokens")[unknown],
        },
    }


def _merges(file, vocab) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the highest score first, as SentencePiece merges."""
    scores = _numbers(file, "scores")
    if max(map(len, vocab), default=0) > MAX_CHARACTERS:
        raise InputError(f"{file.path}: a token of its tokenizer has more than {MAX_CHARACTERS} characters")
    found = []
    for text, i in vocab.items():
        cuts = ((text[:k], text[k:]) for k in range(1, len(text)))
        found += [(-scores[i], i, pair) for pair in cuts if pair[0] in vocab and pair[1] in vocab]
    return [pair for _, _, pair in sorted(found)]


def _vocab(file) -> dict[str, int]:
    kinds = _numbers(file, "token_type")
    return {text: i for i, text in enumerate(_strings(file, "tokens")) if kinds[i] != UNUSED}


def _added(file) -> list[dict]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens, kinds = _strings(file, "tokens"), _numbers(file, "token_type")
    return [
        {"id": i, "content": text, "special": kinds[i] != USER_DEFINED} | flags
        for i, text in enumerate(tokens)
        if kinds[i] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _template(file, *, adds_bos) -> dict | None:
    """What stands before and behind every text."""
    tokens = _strings(file, "tokens")
    ends = [_special(file, name) if _key(file, f"add_{name}_token", default) is True else None
            for name, default in (("bos", adds_bos), ("eos", False))]  # fmt: skip
    if ends == [None, None]:
        return None
    before, behind = ([{"SpecialToken": {"id": tokens[i], "type_id": 0}}] if i is not None else [] for i in ends)
    known = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in ends if i is not None}
    single = [*before, {"Sequence": {"id": "A", "type_id": 0}}, *behind]
    pair = [*single, *before, {"Sequence": {"id": "B", "type_id": 0}}, *behind]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}


def _key(file, name, default=None):
    return file.metadata.get(f"tokenizer.ggml.{name}", default)


def _special(file, name) -> int | None:
    i = _key(file, f"{KEYS.get(name, name)}_token_id")
    return i if type(i) is int and 0 <= i < len(_strings(file, "tokens")) else None


def _strings(file, name) -> list[str]:
    values = _key(file, name)
    if not isinstance(values, list):
        raise InputError(f"{file.path}: tokenizer.ggml.{name} is no array of text")
    return values


def _numbers(file, name) -> list:
    """One number for each token."""
    values, count = _key(file, name), len(_strings(file, "tokens"))
    if not isinstance(values, np.ndarray) or len(values) != count:
        raise InputError(f"{file.path}: tokenizer.ggml.{name} does not hold {count} numbers, one for each token")
    return values.tolist()

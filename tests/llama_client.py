"""The real llama.cpp, for tests: a client of the C API that the xllamacpp wheel exports.

It loads a file, tokenizes, computes logits and keeps what llama.cpp warns about. Keys and values are cached in F32 and
flash attention is off, because both round to fp16 otherwise. Structs are those of the pinned version, as far as they
are used; what follows is room enough. They are the last argument wherever they are passed by value.
"""

import ctypes
import importlib.util
import os
from functools import cache

import numpy as np
import pytest

F32, OFF = 0, 0
WARN, ERROR, CONTINUED = 3, 4, 5  # levels of ggml's log


class ModelParams(ctypes.Structure):
    """llama_model_params; the defaults are taken."""

    _fields_ = [("content", ctypes.c_uint8 * 512)]


class ContextParams(ctypes.Structure):
    """llama_context_params."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, ctypes.c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, ctypes.c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, ctypes.c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor")),
        *((name, ctypes.c_float) for name in ("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 512),
    ]


class Batch(ctypes.Structure):
    """llama_batch: tokens of one sequence at the positions that follow; `logits` marks those to compute."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        *((name, ctypes.c_void_p) for name in ("embd", "pos", "n_seq_id", "seq_id")),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
SIGNATURES = {  # result, arguments
    "llama_backend_init": (None,),
    "llama_log_set": (None, LogCallback, ctypes.c_void_p),
    "llama_model_default_params": (ModelParams,),
    "llama_model_load_from_file": (ctypes.c_void_p, ctypes.c_char_p, ModelParams),
    "llama_model_free": (None, ctypes.c_void_p),
    "llama_model_get_vocab": (ctypes.c_void_p, ctypes.c_void_p),
    "llama_vocab_n_tokens": (ctypes.c_int32, ctypes.c_void_p),
    "llama_tokenize": (
        ctypes.c_int32, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32),
        ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
    ),
    "llama_context_default_params": (ContextParams,),
    "llama_init_from_model": (ctypes.c_void_p, ctypes.c_void_p, ContextParams),
    "llama_free": (None, ctypes.c_void_p),
    "llama_get_memory": (ctypes.c_void_p, ctypes.c_void_p),
    "llama_memory_clear": (None, ctypes.c_void_p, ctypes.c_bool),
    "llama_decode": (ctypes.c_int32, ctypes.c_void_p, Batch),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), ctypes.c_void_p),
}  # fmt: skip
logged: list[list] = []  # [level, text] of every message since the last open_llama


@cache
def c_library() -> ctypes.CDLL:
    """llama.cpp and ggml as a C library; skips the test where xllamacpp is absent."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed: pip install -e .[llamacpp]")
    library = ctypes.CDLL(importlib.import_module("xllamacpp.xllamacpp").__file__)
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_keep, None)
    library.llama_backend_init()
    return library


@LogCallback
def _keep(level, text, _):
    text = text.decode(errors="replace")
    if level == CONTINUED and logged:
        logged[-1][1] += text
    else:
        logged.append([level, text])


def _complaints() -> str:
    return "".join(text for level, text in logged if level in (WARN, ERROR))


class Llama:
    """A loaded model.

    Args:
        path: The file.
        n_ctx: Tokens of context, and the most that are computed at once.

    Attributes:
        warnings: What llama.cpp complained about while it loaded the file.
    """

    def __init__(self, path, *, n_ctx: int):
        logged.clear()
        self._library, self._context = c_library(), None
        self._model = self._library.llama_model_load_from_file(
            os.fsencode(path), self._library.llama_model_default_params()
        )
        self.warnings = _complaints()
        assert self._model, self.warnings
        self._vocab = self._library.llama_model_get_vocab(self._model)
        chosen = self._library.llama_context_default_params()
        chosen.n_ctx = chosen.n_batch = chosen.n_ubatch = n_ctx
        assert (chosen.flash_attn_type, chosen.type_k, chosen.type_v) == (-1, 1, 1), "another version of xllamacpp"
        chosen.flash_attn_type, chosen.type_k, chosen.type_v = OFF, F32, F32
        chosen.n_seq_max = chosen.n_threads = chosen.n_threads_batch = 1
        self._context = self._library.llama_init_from_model(self._model, chosen)
        assert self._context, _complaints()

    def tokenize(self, text: str, *, add_special=True) -> list[int]:
        """Token ids as Hugging Face tokenizes: special tokens in the text are taken for what they are."""
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 16))()
        count = self._library.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), add_special, True)
        assert count >= 0
        return list(ids[:count])

    def logits(self, ids: list[int]) -> np.ndarray:
        """(T, vocabulary) for a text from its beginning."""
        count = len(ids)
        tokens, wanted = (ctypes.c_int32 * count)(*ids), (ctypes.c_int8 * count)(*[1] * count)
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        failed = self._library.llama_decode(self._context, Batch(count, tokens, None, None, None, None, wanted))
        assert not failed, _complaints()
        shape = count, self._library.llama_vocab_n_tokens(self._vocab)
        return np.ctypeslib.as_array(self._library.llama_get_logits(self._context), shape).copy()

    def close(self):
        """Frees the model."""
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)


def open_llama(path, *, n_ctx=512) -> Llama:
    """llama.cpp with a model loaded; skips the test where xllamacpp is absent."""
    return Llama(path, n_ctx=n_ctx)

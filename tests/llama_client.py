"""The real llama.cpp, for tests: the client of the shared folder, with exact arithmetic where the file is exact.

Keys and values are cached in F32 and flash attention is off; both round to fp16 otherwise.
"""

import ctypes
import importlib
import sys
from pathlib import Path

import pytest

CLIENTS = Path(__file__).parents[2] / "shared" / "clients"
FLASH_ATTENTION, CACHE_K, CACHE_V = 13, 26, 27  # positions in llama_context_params of the pinned xllamacpp, in words


def open_llama(path, *, n_ctx=512):
    """llama.cpp with a model loaded; skips the test where xllamacpp or its client is absent."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed: pip install -e .[llamacpp]")
    if not CLIENTS.is_dir():
        pytest.skip(f"{CLIENTS} is not here")
    if str(CLIENTS) not in sys.path:
        sys.path.append(str(CLIENTS))
    llamac = importlib.import_module("llamac")
    llama = llamac.Llama(str(path), n_ctx=n_ctx, threads=1)
    _exact_context(llamac, llama, n_ctx)
    return llama


def tokenize(llama, text: str, *, add_special=True) -> list[int]:
    """Token ids as Hugging Face tokenizes: special tokens in the text are taken for what they are."""
    raw = text.encode()
    ids = (ctypes.c_int32 * (len(raw) + 16))()
    count = llama._tok(llama.voc, raw, len(raw), ids, len(ids), add_special, True)
    assert count >= 0
    return list(ids[:count])


def _exact_context(llamac, llama, n_ctx):
    library = llama.L
    library.llama_free(llama.c)
    parameters = library.llama_context_default_params
    parameters.restype = llamac.CtxParams
    chosen = parameters()
    chosen.n_ctx = chosen.n_batch = chosen.n_ubatch = n_ctx
    chosen.n_seq_max = 1
    words = ctypes.cast(ctypes.pointer(chosen), ctypes.POINTER(ctypes.c_int32))
    assert (words[FLASH_ATTENTION], words[CACHE_K], words[CACHE_V]) == (-1, 1, 1), "another version of xllamacpp"
    words[FLASH_ATTENTION] = words[CACHE_K] = words[CACHE_V] = 0
    llama.c = library.llama_init_from_model(llama.m, chosen)
    library.llama_set_n_threads(llama.c, 1, 1)
    llama.mem = library.llama_get_memory(llama.c)

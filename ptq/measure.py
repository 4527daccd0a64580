"""The measures of an artefact, as `ptq.evaluate` prints them and `ptq.baselines` puts them into tables."""

import os
from pathlib import Path

import torch

from calibration.corpora import load_documents
from calibration.errors import InputError
from calibration.tokens import heldout_tokens, is_token_file, leading_special_tokens
from ptq.defaults import choose_device, choose_dtype, window_length
from ptq.evaluation.harness import Score, answer_store, document_tasks, load_tasks, run_tasks
from ptq.evaluation.perplexity import prepare_windows
from ptq.evaluation.protocols import WINDOWS
from ptq.load import load_model
from ptq.reload import open_tokenizer, open_weights
from ptq.streamed import StreamedModel


def default_cache() -> Path:
    """Where answers to tasks are kept unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptq"


def open_streamed(path, *, device="auto", dtype="auto", trust_remote_code=False) -> StreamedModel:
    """An artefact, of which one block at a time is in memory.

    Raises:
        InputError: As open_weights, choose_device, choose_dtype and StreamedModel.
    """
    weights, place = open_weights(path, trust_remote_code=trust_remote_code), choose_device(device)
    dtype = choose_dtype(dtype, place, weights.config)
    return StreamedModel(weights, dtype=dtype, device=place, trust_remote_code=trust_remote_code)


def protocol_windows(
    model: StreamedModel,
    source: str,
    protocol: str,
    *,
    seqlen: int | None = None,
    max_tokens: int | None = None,
    trust_remote_code=False,
) -> tuple[torch.Tensor, int]:
    """Windows (n, seqlen) of a held-out text, and how many leading positions of each do not count.

    Args:
        model: Brings the tokenizer and the context.
        source: Corpus name or file.
        protocol: Key of WINDOWS.
        seqlen: Tokens in a window; None for the protocol's, or the model's context if that is shorter.
        max_tokens: Stop after so many; None for the whole text.
        trust_remote_code: Run Python code that the folder brings.

    Raises:
        InputError: There is no usable tokenizer, or text and context do not give one window.
    """
    folder, config = model.checkpoint.folder, model.config
    tokenizer = open_tokenizer(model.checkpoint, trust_remote_code=trust_remote_code)
    if tokenizer is None and not is_token_file(source):
        raise InputError(f"{folder}: has no usable tokenizer; give --text a .npy file of ids")
    usual = min(WINDOWS[protocol], window_length(config, None))
    windows = heldout_tokens(
        tokenizer,
        source,
        seqlen=window_length(config, seqlen or usual),
        max_tokens=max_tokens,
        vocab_size=config.vocab_size,
    )
    window_length(config, windows.shape[1])
    return prepare_windows(protocol, windows, [] if tokenizer is None else leading_special_tokens(tokenizer))


def whole_documents(source: str, data_dir: Path | None = None) -> dict:
    """The harness's task of protocol lm-eval: its own wikitext, or the documents of another text.

    Raises:
        InputError: Token rows have no words, or the text is not there.
    """
    if source == "wikitext2":
        return load_tasks(("wikitext",), data_dir)
    if is_token_file(source):
        raise InputError(f"{source}: --protocol lm-eval counts words and bytes, and token rows have none")
    return document_tasks(load_documents(source, "heldout", needed_characters=None))


def task_scores(
    path,
    tasks: dict,
    *,
    cache: Path,
    seqlen: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    device="auto",
    dtype="auto",
    trust_remote_code=False,
) -> list[Score]:
    """Scores of an artefact, whole in memory, on loaded tasks; answers in `cache` are not asked again.

    Raises:
        InputError: As load_model, or seqlen passes the context.
    """
    loaded = load_model(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    length = None if seqlen is None else window_length(loaded.model.config, seqlen)
    store = answer_store(loaded.folder, loaded.model, cache, length)
    options = {"batch_size": batch_size, "limit": limit, "max_length": length}
    return run_tasks(loaded.model, loaded.tokenizer, tasks, store, **options)

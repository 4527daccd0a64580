"""Models of which figures are published, and how the documents spell them."""

import re
from collections.abc import Iterable

from ptq.evaluation.published.rows import PublishedRow

# Regular expressions, which find a model in hub ids, names of folders and the documents' own names.
TINYLLAMA = r"tinyllama"
LLAMA_3_2_3B = r"llama-3\.2-3b"
LLAMA_2_7B = r"llama-2[- ]7b(?!-chat)"
LLAMA_1_7B = r"llama-1[- ]7b|huggyllama/llama-7b"
OPEN_LLAMA_3B = r"(?<!\w)llama 3b|open_llama_3b"
STARCODER_3B = r"starcoderbase-3b"
SPELLINGS = (TINYLLAMA, LLAMA_3_2_3B, LLAMA_2_7B, LLAMA_1_7B, OPEN_LLAMA_3B, STARCODER_3B)


def is_spelled(spelling: str, name: str) -> bool:
    """Whether a name is one of a model's."""
    return re.search(spelling, name, re.IGNORECASE) is not None


def rows_like(model: str, rows: Iterable[PublishedRow]) -> list[PublishedRow]:
    """The rows of the model that a hub id or a folder's name is of; none if it is of no published one."""
    spelling = next((spelling for spelling in SPELLINGS if is_spelled(spelling, model)), None)
    return [] if spelling is None else [row for row in rows if is_spelled(spelling, row.model)]

"""What a model answered to the harness's requests, kept on disk as the answers come.

A killed evaluation loses one batch, and a finished one is read back. The harness has a cache of its own, which pickles.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

HASHED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
REPORT = "ptq_report.json"  # says how long a run took: no part of the artefact
CHUNK_BYTES = 1 << 24
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")  # the harness's words for a request


class AnswerStore:
    """Answers by request, in a file of JSON lines.

    Args:
        file: Where they are kept, and read from if it exists; None keeps them in memory.
        bar_file: Where progress is shown; nothing is shown where that is no terminal.
    """

    def __init__(self, file: Path | None, bar_file=None):
        self._file, self._bar_file, self._bar, self._known = file, bar_file, None, {}
        if file is not None and file.exists():
            self._known = dict(_whole_lines(file))
        elif file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._known)

    def attach(self, lm):
        """Makes a harness model ask itself only what is not known yet."""
        lm.set_cache_hook(self)
        for kind in KINDS:
            setattr(lm, kind, self._answering(kind, getattr(lm, kind)))

    def add_partial(self, kind: str, request: Iterable, answer):
        """Keeps one answer; the harness calls this after each of a batch."""
        key = _key(kind, request)
        if key in self._known:
            return
        self._known[key] = answer
        if self._bar is not None:
            self._bar.update()
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps([key, answer]) + "\n")

    def _answering(self, kind, ask: Callable) -> Callable:
        def answer(requests, **_):
            missing = {_key(kind, request.args): request for request in requests}
            missing = [request for key, request in missing.items() if key not in self._known]
            with tqdm(total=len(missing), desc=kind, file=self._bar_file, disable=None, leave=False) as self._bar:
                for batch in _batches(kind, missing):
                    for request, said in zip(batch, ask(batch, disable_tqdm=True), strict=True):
                        self.add_partial(kind, request.args, said)
            self._bar = None
            return [_as_answer(self._known[_key(kind, request.args)]) for request in requests]

        return answer


def artefact_hash(artefact: Path) -> str:
    """Hex sha256 of a file, or of every file of a folder that has a say in what the model answers."""
    digest = hashlib.sha256()
    inside = {file for pattern in HASHED for file in artefact.glob(pattern) if file.name != REPORT}
    for file in [artefact] if artefact.is_file() else sorted(inside):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while chunk := content.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _batches(kind, requests):
    """All at once, in the harness's own order and batches; whole documents one by one, as it keeps none before all."""
    if kind == "loglikelihood_rolling":
        return [[request] for request in requests]
    return [requests] if requests else []


def _whole_lines(file):
    """Key and answer of each line; the last one is cut short where a run was killed."""
    content = file.read_text(encoding="utf-8")
    whole = content[: content.rfind("\n") + 1]
    if whole != content:
        file.write_text(whole, encoding="utf-8")
    return (json.loads(line) for line in whole.splitlines())


def _key(kind, request):
    return hashlib.sha256(json.dumps([kind, *request], sort_keys=True).encode()).hexdigest()[:32]


def _as_answer(value):
    return tuple(value) if isinstance(value, list) else value

"""One cell after the other, each in a process of its own, its result kept in a file that is whole or not there.

A process apart gives the cell's own peak memory, and nothing that happens in it, not even being killed for memory,
stops the next. It ends with the command that started it.
"""

import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

from calibration.errors import InputError
from ptq.baselines.grid import FULL, Cell, Settings
from ptq.baselines.rows import KL, SAME
from ptq.defaults import default_budget
from ptq.evaluation.divergence import measure_divergence
from ptq.evaluation.harness import Score, load_tasks, preset_average
from ptq.evaluation.perplexity import measure_perplexity
from ptq.evaluation.tasks import choose_tasks
from ptq.measure import default_cache, open_streamed, protocol_windows, task_scores, whole_documents
from ptq.outcome import REPORT
from ptq.pipeline import quantize_model
from ptq.workdir import write_atomically

RESULT, ERROR, ARTEFACT = "result.json", "error.txt", "artefact"
PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


def run_cell(cell: Cell, settings: Settings, folder: Path, *, keep: bool) -> dict:
    """Makes and measures one cell in a process of its own, or reads what an earlier run found.

    Args:
        cell: What to measure.
        settings: How.
        folder: The cell's own; holds result.json when it is done.
        keep: Leave the artefact there.

    Returns:
        The result, or {"error": one line}, which the next run tries again.
    """
    code = 0 if (folder / RESULT).exists() else _in_a_process(cell, settings, folder)
    if code == 0 and not keep:
        shutil.rmtree(folder / ARTEFACT, ignore_errors=True)
    if code == 0:
        return json.loads((folder / RESULT).read_bytes())
    if (folder / ERROR).exists():
        return {"error": (folder / ERROR).read_text(encoding="utf-8")}
    return {"error": f"its process ended with {_exit_text(code)}"}


def _in_a_process(cell, settings, folder) -> int:
    """Its exit status; negative for a signal."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ERROR).unlink(missing_ok=True)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(cell, settings, folder, os.getpid()))
    child.start()
    child.join()
    return child.exitcode


def _child(cell, settings, folder, parent):
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        sys.exit(1)
    try:
        result = measure_cell(cell, settings, folder)
        write_atomically(folder / RESULT, (json.dumps(result, indent=2) + "\n").encode())
    except KeyboardInterrupt:
        sys.exit(1)
    except BaseException as error:  # whatever it is, it is this cell's row
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        write_atomically(folder / ERROR, " ".join(text.split()).encode())
        if not isinstance(error, InputError):
            (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        sys.exit(1)


def measure_cell(cell: Cell, settings: Settings, folder: Path) -> dict:
    """Quantizes into a folder's artefact/ unless that is there, and measures it.

    Raises:
        InputError: Anything the user can mend.
    """
    path, made = cell.source, {}
    if cell.method != FULL:
        path = folder / ARTEFACT
        made = _make(cell, settings, path)
        path = next(path.glob("*.gguf"), path)
    figures = _of_texts(cell, path, settings) + _tasks(path, settings)
    return {"figures": [figure.as_dict() for figure in figures], **made}


def _make(cell, settings, out):
    artefact = quantize_model(
        cell.source,
        cell.spec(settings),
        out=out,
        calibration=settings.calibration,
        samples=settings.samples,
        seqlen=settings.seqlen,
        heldout="none",
        device=settings.device,
        dtype=settings.dtype,
        resume=True,
    )
    shutil.copyfile(out / REPORT, out.parent / REPORT)
    names = ("bits_per_weight", "file_bytes", "peak_memory_bytes", "resumed")
    report = artefact.report
    return {
        **{name: report[name] for name in names},
        "seconds": report["seconds"]["total"],
        "calibration": report["identity"]["calibration"],
    }


def _of_texts(cell, path, settings) -> list[Score]:
    how = {"device": settings.device, "dtype": settings.dtype}
    if settings.protocol == "lm-eval":
        how |= {"cache": default_cache(), "seqlen": settings.seqlen, "limit": settings.limit}
        return [score for text in settings.texts for score in _of_documents(path, text, settings, how)]
    model = open_streamed(path, **how)
    reference = open_streamed(cell.source, **how) if settings.divergence and cell.method != FULL else None
    return [score for text in settings.texts for score in _of_windows(model, reference, text, settings)]


def _of_windows(model, reference, text, settings) -> list[Score]:
    name, cut = settings.label(text), {"seqlen": settings.seqlen, "max_tokens": settings.max_tokens}
    windows, skip = protocol_windows(model, text, settings.protocol, **cut)
    with tempfile.TemporaryDirectory(prefix="ptq-") as folder:
        spill = {"spill": Path(folder), "budget": default_budget()}
        if reference is None:
            found = measure_perplexity(model, windows, skip=skip, **spill)
            return [Score(name, "perplexity", found.perplexity, found.stderr, found.tokens)]
        far = measure_divergence(model, reference, windows, skip=skip, **spill)
    return [
        Score(name, "perplexity", far.model.perplexity, far.model.stderr, far.tokens),
        Score(name, KL, far.kl, far.kl_stderr, far.tokens),
        Score(name, SAME, far.same_top, None, far.tokens),
    ]


def _of_documents(path, text, settings, how) -> list[Score]:
    """The harness calls every text wikitext; only its own keeps the name."""
    scores = task_scores(path, whole_documents(text, _data_dir(settings)), **how)
    return scores if text == "wikitext2" else [replace(score, task=settings.label(text)) for score in scores]


def _data_dir(settings) -> Path | None:
    return None if settings.data_dir is None else Path(settings.data_dir)


def _tasks(path, settings) -> list[Score]:
    if settings.tasks is None:
        return []
    data_dir = _data_dir(settings)
    names, _ = choose_tasks(settings.tasks, data_dir)
    how = {"device": settings.device, "dtype": settings.dtype, "limit": settings.limit, "cache": default_cache()}
    scores = task_scores(path, load_tasks(names, data_dir), **how)
    average = preset_average(settings.tasks, scores)
    return scores if average is None else [*scores, Score("average", "", average[1], None, 0)]


def _exit_text(code):
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"

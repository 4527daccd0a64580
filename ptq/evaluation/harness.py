"""Task scores by lm-evaluation-harness, which asks and counts; this gives it a model and remembers the answers.

The harness is an extra (`pip install ptq[eval]`), so it is imported where it is used.
"""

import contextlib
import hashlib
import io
import json
import logging
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from calibration.errors import InputError
from ptq.evaluation.answers import AnswerStore, artefact_hash
from ptq.evaluation.tasks import PRESETS, Preset, articles, local_config, pages_config

FEWSHOT_SEED = 1234  # the harness's own
PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class Score:
    """One metric of one task: its value, its standard error (None where the harness gives none) and the questions."""

    task: str
    metric: str
    value: float
    stderr: float | None
    questions: int

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


def load_tasks(names: tuple[str, ...], data_dir: Path | None) -> dict:
    """The harness's tasks by name, from local files where there is a folder of them, else from the hub or its cache.

    Raises:
        InputError: A name is no task, its file is missing or broken, or the hub did not give its questions.
    """
    _check_harness()
    from lm_eval.tasks import TaskManager

    if data_dir is not None:
        return _own_tasks([local_config(name, data_dir) for name in names])
    manager = TaskManager()
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise InputError(
            f"--tasks {', '.join(unknown)}: the harness knows no such task (`lm-eval ls tasks` lists them)"
        )
    _offline_without_network()
    parts = [_hub_task(manager, name) for name in names]
    return {key: {k: v for part in parts for k, v in part[key].items()} for key in parts[0]}


def document_tasks(documents: Iterable[str]) -> dict:
    """The harness's wikitext task over documents of one's own; one in WikiText's markup is taken apart into articles.

    Perplexity of words and of bytes, and bits per byte. Words and bytes are the document's as it is; what is scored is
    the text after the harness's detokenizer, which mends the spaces that WikiText has around punctuation.
    """
    _check_harness()
    pages = [page for document in documents for page in articles(document)]
    return _own_tasks([pages_config("wikitext", pages)])


def run_tasks(
    model,
    tokenizer,
    tasks: dict,
    store: AnswerStore,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    max_length: int | None = None,
) -> list[Score]:
    """Scores of a transformers model on loaded tasks.

    Args:
        model: The model, in memory.
        tokenizer: Its tokenizer.
        tasks: From load_tasks.
        store: What was answered before, and where new answers go.
        batch_size: Requests in a forward.
        limit: Questions of each task; None for all.
        max_length: Tokens of a forward; None for the model's context.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        lm = HFLM(model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        store.attach(lm)
        for task in tasks["tasks"].values():  # as the harness's own command line does
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        results = evaluate(lm, tasks, limit=limit, log_samples=False)
    return _scores(results)


def answer_store(folder: Path, model, cache: Path, max_length: int | None = None) -> AnswerStore:
    """The answers of one artefact, computed in one way by one version of the harness."""
    identity = {
        "artefact": artefact_hash(folder),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "max_length": max_length,
        "versions": [version(name) for name in ("lm_eval", "torch", "transformers")],
    }
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    return AnswerStore(Path(cache) / f"{name}.jsonl", sys.stderr)


def average(preset: Preset, scores: list[Score]) -> float | None:
    """The average that a preset's table prints, as a fraction; None if a task of it was not run."""
    counted = [s for s in scores if s.task in preset.averaged and preset.metric in ("", s.metric)]
    complete = preset.averaged and {score.task for score in counted} == set(preset.averaged)
    return sum(score.value for score in counted) / len(counted) if complete else None


def preset_average(wanted: str, scores: list[Score]) -> tuple[str, float] | None:
    """Name and value of the average under a preset's table, if `wanted` is one and all of it was run."""
    preset = PRESETS.get(wanted, Preset(()))
    value = average(preset, scores)
    return None if value is None else (preset.average, value)


def _check_harness():
    if find_spec("lm_eval") is None:
        raise InputError("this needs lm-evaluation-harness: pip install 'ptq[eval]'")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _own_tasks(configs) -> dict:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False).load([_own_task(config) for config in configs])


def _own_task(config):
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks.wikitext import preprocess_wikitext as wikitext

    rows = config.pop("rows")
    if "page" in rows[0]:
        config |= {"doc_to_target": wikitext.wikitext_detokenizer, "process_results": wikitext.process_results}
    return ConfigurableTask(config=config | {"custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}})


def _hub_task(manager, name):
    try:
        with _quiet():
            return manager.load([name])
    except Exception as error:  # whatever the hub, the network and the many readers of data sets raise
        raise InputError(
            f"task {name}: its questions are neither in the Hugging Face cache nor to be had from the hub"
            f" ({type(error).__name__}); give --data-dir a folder with {name}.jsonl, or run it once with a network"
        ) from error


def _offline_without_network():
    """Looks in the cache alone where the hub does not answer: datasets would ask it for half a minute, task by task."""
    import datasets
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.HfApi().endpoint, timeout=PROBE_SECONDS)
    except Exception:  # the HTTP library, and with it the exception types, changes with the hub's version
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


@contextlib.contextmanager
def _quiet():
    """The harness's bars and remarks are not for our streams; AnswerStore shows a bar of its own."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def _scores(results) -> list[Score]:
    scores = []
    for task, figures in results["results"].items():
        questions = results["n-samples"].get(task, {}).get("effective") or figures.get("sample_len", 0)
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                error = figures.get(f"{metric}_stderr,{kind}")
                scores.append(Score(task, metric, value, error if isinstance(error, float) else None, questions))
    return scores

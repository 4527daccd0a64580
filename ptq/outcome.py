"""What came of a run: its report, and the files in the artefact that tell of it."""

import json
import math
import sys
from pathlib import Path

from ptq.continuation import continuation
from ptq.evaluation.perplexity import measure_perplexity
from ptq.job import Job
from ptq.load import LoadedModel
from ptq.memory import peak_memory
from ptq.report.facts import weight_histograms
from ptq.report.files import REPORT, write_card, write_page
from ptq.workdir import WorkFolder

WHOLE_BYTES = 1 << 27  # a model of so many is held whole to say something; ptq.report does it for any
PROMPT_TOKENS, SAID_TOKENS = 16, 48


def outcome(job: Job, work: WorkFolder, packed, per_linear: dict) -> dict:
    """The report.

    Args:
        job: The run.
        work: Its work folder.
        packed: The written artefact as plain weights; it is measured here.
        per_linear: Reports of the linears by name.
    """
    streamed, kind, clock = job.streamed, job.kind, job.clock
    with clock.phase("perplexity"):
        perplexity = _measure(job, packed, work)
    with clock.phase("generate"):
        generations = _generations(job, packed)
    verdicts = kind.runtimes(job.linears, streamed.checkpoint.config["model_type"])
    return {
        "identity": job.identity,
        "model": streamed.checkpoint.folder.resolve().name,
        "command": job.command,
        "perplexity": perplexity,
        **_sizes(job, kind.sizes(packed, job.linears)),
        "seconds": _rounded(clock.seconds, clock.total),
        "processor_seconds": _rounded(clock.processor, clock.total_processor),
        "peak_memory_bytes": peak_memory(streamed.device),
        "resumed": work.resumed,
        "runtimes": [verdict.as_dict() for verdict in verdicts],
        "notes": job.notes,
        "bytes": kind.bytes_by_part(packed),
        "histograms": weight_histograms(streamed.checkpoint, packed, per_linear),
        "tuning": work.tuned_report(),
        "generations": generations,
        "mixture": kind.mixture_report(work),
        "linears": per_linear,
    }


def write_outcome(folder: Path, report: dict, out: Path):
    """Writes the report, its page and the model card; a fault in the latter two does not cost the artefact.

    Args:
        folder: Where the artefact is written.
        report: From outcome().
        out: What the folder will be called.
    """
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    try:
        write_page(folder, report)
        write_card(folder, report, str(out))
    except Exception as error:  # drawing is a large library's work
        print(f"warning: no report.html or README.md: {type(error).__name__}: {error}", file=sys.stderr)


def _rounded(phases, total) -> dict[str, float]:
    return {name: round(spent, 3) for name, spent in {**phases, "total": total}.items()}


def _generations(job, packed) -> dict | None:
    """What both models say after the first words of the held-out text, where the whole model is small."""
    source, size = job.streamed.checkpoint, job.streamed.weight_count * job.streamed.dtype.itemsize
    if job.windows is None or job.tokenizer is None or size > WHOLE_BYTES:
        return None
    room = job.windows.shape[1]
    prompt = job.windows[:1, : min(PROMPT_TOKENS, room // 2)]
    texts = {"prompt": job.tokenizer.decode(prompt[0])}
    for when, model in (("before", job.streamed), ("after", job.streamed.with_weights(packed))):
        loaded = LoadedModel(source.folder, model.whole(), job.tokenizer)
        said = continuation(loaded, prompt, max_new_tokens=min(SAID_TOKENS, room - prompt.shape[1]))
        texts[when] = job.tokenizer.decode(said, skip_special_tokens=True)
    return texts


def _sizes(job, after) -> dict:
    """Bits per weight and bytes of files, before and after."""
    source = job.streamed.checkpoint
    weights = sum(math.prod(source.shape(name)) for name in source.names())
    in_linears = sum(outputs * inputs for outputs, inputs in job.linears.values())
    return {
        "parameters": weights,
        "bits_per_weight": {
            "before": 8 * sum(source.nbytes(name) for name in source.names()) / weights,
            "after": 8 * after["tensors"] / weights,
            "linears": 8 * after["linears"] / in_linears,
            "shortest": 8 * after.get("shortest", after["linears"]) / in_linears,
        },
        "file_bytes": {"before": sum(path.stat().st_size for path in source.shards), "after": after["files"]},
    }


def _measure(job, packed, work):
    if job.windows is None:
        return None
    before, after = (
        measure_perplexity(model, job.windows, spill=work.folder / "heldout", budget=job.plan.activations, label=label)
        for model, label in ((job.streamed, "before"), (job.streamed.with_weights(packed), "after"))
    )
    return {"text": job.text, "before": before.as_dict(), "after": after.as_dict()}

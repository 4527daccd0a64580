"""From a model folder to a verified, measured artefact: the order of the steps, and nothing else.

open -> calibrate -> settle types -> walk -> write aside -> read back and compare -> measure -> rename. Whatever can be
refused is refused before the walk; the output folder appears only when all of it is true.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from calibration.errors import InputError, TrainingStopped
from calibration.ranks import ALONE, Ranks
from ptq.job import Job, open_job
from ptq.memory import return_large_blocks
from ptq.outcome import REPORT, outcome, write_outcome
from ptq.spec import QuantSpec
from ptq.tuning.end_to_end import EndToEndTuning
from ptq.workdir import Scratch, WorkFolder, work_folder


@dataclass(frozen=True)
class Artefact:
    """A finished output folder and its report, as in ptq_report.json."""

    folder: Path
    report: dict


def quantize_model(
    model: str | Path | None = None,
    spec: QuantSpec | None = None,
    *,
    out: str | Path | None = None,
    calibration: str | None = None,
    samples: int = 128,
    seqlen: int | None = None,
    heldout: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    activation_budget: int | None = None,
    max_memory: int | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    command: str | None = None,
    ranks: Ranks = ALONE,
) -> Artefact | None:
    """Quantizes a Hugging Face model folder into a packed GPTQ folder.

    Args:
        model: Folder or hub id; None for the embedded demo model.
        spec: What to do; QuantSpec() if None.
        out: Output folder, which must not exist; None for quantized/<model>-w<bits>g<group>-<method>.
        calibration: Corpus name or file; None for stdlib with the demo model and c4 otherwise.
        samples: Calibration rows.
        seqlen: Tokens in a row; None for the model's context, at most 2048.
        heldout: Corpus or file for the perplexity before and after; "none" leaves it out; None chooses a corpus
            that calibration did not see.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: What blocks are computed in: "auto" (float32 on a CPU, the checkpoint's own on a GPU) or a name.
        activation_budget: Bytes of activations kept in memory, the rest goes to the work folder; None for two fifths
            of the machine's memory. Does not change the result.
        max_memory: Bytes of resident memory to plan for in each process, on a CPU, for methods that do not train whole
            blocks; what does not fit is worked on from disk. A plan from shapes, not enforced. Does not change the
            result, but where a model that does not fit whole writes no text of its own. None for no limit.
        resume: Go on with an interrupted run.
        trust_remote_code: Let the checkpoint bring its own model code.
        command: What to print as the way to make this artefact; None for this call.
        ranks: This process's place among several, from join_ranks(); every rank makes the same call.

    Returns:
        The artefact; None on other ranks than the first, which neither write nor measure.

    Raises:
        InputError: Anything the user can mend; nothing is left behind.
        TrainingStopped: A block's training broke off; finished blocks and its best state stay for resume.
        OSError: The disk failed; finished blocks stay in the work folder for resume.
        RankLost: Another rank has ended; finished blocks stay in the work folder for resume.
    """
    return_large_blocks()
    job = open_job(
        model, spec or QuantSpec(), out=out, calibration=calibration, samples=samples, seqlen=seqlen, heldout=heldout,
        device=device, dtype=dtype, activation_budget=activation_budget, max_memory=max_memory, resume=resume,
        trust_remote_code=trust_remote_code, command=command, ranks=ranks,
    )  # fmt: skip
    if ranks.from_first(lambda: os.path.lexists(job.out)):
        return _finished_before(job.out, job.identity) if ranks.first else None
    if not ranks.first:
        return _follow(job)
    work = WorkFolder(job.out, job.identity, resume=resume)
    try:
        return Artefact(job.out, _run(job, work))
    except TrainingStopped:
        raise
    except InputError:
        work.discard()
        raise
    except OSError as error:
        what = f"{error.strerror or error}{work.remains}"
        raise OSError(error.errno, what, error.filename or str(work.folder)) from error
    finally:
        work.close()


def _follow(job: Job):
    """What other ranks than the first do."""
    scratch = Scratch(job.out, job.ranks.rank)
    try:
        job.quantize(scratch)
    finally:
        scratch.close()


def _run(job: Job, work: WorkFolder) -> dict:
    """Walks, writes aside, checks, measures and publishes; the report."""
    streamed, kind, clock = job.streamed, job.kind, job.clock
    tokens, embed = job.quantize(work)
    tuning = {"budget": job.plan.activations, "bf16": job.bf16, "embed": embed}
    EndToEndTuning(streamed, job.spec, kind.codec, work, clock, **tuning).run(tokens)
    per_linear = {name: entry for i in range(len(streamed.blocks)) for name, entry in work.report(i).items()}
    folder = work.artefact
    with clock.phase("write"):
        kind.write(folder, streamed, work)
    with clock.phase("verify"):
        packed = kind.open(folder)
        kind.verify(packed, streamed, work, per_linear)
    report = outcome(job, work, packed, per_linear)
    write_outcome(folder, report, work.out)
    work.publish(folder)
    return report


def _finished_before(out, identity) -> Artefact:
    """What an earlier run finished; it may have been killed before it removed its work folder."""
    report = out / REPORT
    known = json.loads(report.read_bytes()) if report.is_file() else {}
    if known.get("identity") != json.loads(json.dumps(identity)):
        raise InputError(f"{out}: exists already and is not this run's; choose another --out or delete it")
    if work_folder(out).exists():
        WorkFolder(out, identity, resume=True).discard()
    return Artefact(out, known)

"""From a model folder to a verified, measured artefact: the order of the steps, and nothing else.

open -> calibrate -> settle types -> walk -> write aside -> read back and compare -> measure -> rename. Whatever can be
refused is refused before the walk; the output folder appears only when all of it is true.
"""

import json
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from calibration.errors import InputError, TrainingStopped
from calibration.ranks import ALONE, Ranks
from calibration.tokens import CalibrationSet, heldout_tokens, is_token_file, sample_calibration
from ptq.budget import MemoryPlan, plan_memory
from ptq.checkpoint import open_checkpoint
from ptq.clock import Clock
from ptq.continuation import continuation
from ptq.defaults import choose_device, choose_dtype, choose_products, default_budget, whole_model_room, window_length
from ptq.demo import DEMO
from ptq.evaluation.perplexity import measure_perplexity
from ptq.formats import GgufFormat, GptqFormat, format_of
from ptq.load import LoadedModel
from ptq.memory import peak_memory, resident_memory, return_large_blocks
from ptq.own_text import OwnText
from ptq.reload import load_tokenizer
from ptq.report.card import python_call
from ptq.report.facts import weight_histograms
from ptq.report.files import write_card, write_page
from ptq.spec import QuantSpec
from ptq.streamed import StreamedModel
from ptq.tuning.fisher import FisherPass
from ptq.tuning.scales import ScaleTuning
from ptq.walk import BATCH_TOKENS, Walk, most_ranks
from ptq.workdir import Scratch, WorkFolder, differences, work_folder

VERSION = "0.1.0"
REPORT = "ptq_report.json"
HELDOUT_TOKENS = 32768  # of the before-and-after figures; ptq.evaluate reads whole texts
WHOLE_BYTES = 1 << 27  # a model of so many is held whole to say something; ptq.report does it for any
PROMPT_TOKENS, SAID_TOKENS = 16, 48


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
        max_memory: Bytes of resident memory to plan for in each process, on a CPU and without training; what does not
            fit is worked on from disk. A plan from shapes, not enforced. Does not change the result. None for no limit.
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
    clock, spec = Clock(), spec or QuantSpec()
    kind = format_of(spec)
    spec = kind.spec
    text_flags = {"calibration": calibration, "samples": samples, "seqlen": seqlen, "heldout": heldout}
    command = command or python_call(model, spec, **text_flags)
    is_demo = model is None
    checkpoint = open_checkpoint(DEMO if is_demo else model, trust_remote_code=trust_remote_code)
    if checkpoint.quantization_config is not None:
        raise InputError(f"{checkpoint.folder}: is quantized already; quantize the full-precision model")
    out = Path(out) if out else Path("quantized") / kind.name(checkpoint.folder.resolve().name)
    if os.path.lexists(out) and not resume:
        raise InputError(f"{out}: exists already; choose another --out or delete it")
    torch_device = choose_device(ranks.device(device))
    torch_dtype = choose_dtype(dtype, torch_device, checkpoint.config)
    streamed = StreamedModel(checkpoint, dtype=torch_dtype, device=torch_device, trust_remote_code=trust_remote_code)
    linears = _linears(streamed)
    kind.check(streamed, linears)
    with clock.phase("calibration"):
        tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code)
        calibration = calibration or ("stdlib" if is_demo else "c4")
        drawn = _calibrate(tokenizer, streamed, spec, calibration, samples, seqlen)
        text, windows = _heldout(tokenizer, streamed, heldout, calibration, drawn, seqlen)
    budget = default_budget() if activation_budget is None else activation_budget
    if budget < 0:
        raise InputError(f"activation memory {budget} is negative; 0 keeps everything on disk")
    plan = MemoryPlan(budget, sums_on_disk=False)
    if max_memory is not None:
        plan = plan_memory(max_memory, resident_memory(), streamed, spec, drawn, measures=windows is not None)
        plan = replace(plan, activations=min(budget, plan.activations))
    bf16 = choose_products(dtype, torch_device)
    job = _Job(streamed, spec, kind, linears, drawn, text, windows, tokenizer, clock, plan, command, ranks, bf16)
    _check_ranks(job)
    if ranks.from_first(lambda: os.path.lexists(out)):
        return _finished_before(out, job.identity) if ranks.first else None
    if not ranks.first:
        return _follow(job, out)
    work = WorkFolder(out, job.identity, resume=resume)
    try:
        return Artefact(out, _run(job, work))
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


@dataclass(frozen=True)
class _Job:
    """A run after everything that can be refused has been checked."""

    streamed: StreamedModel
    spec: QuantSpec
    kind: GptqFormat | GgufFormat
    linears: dict[str, tuple[int, int]]
    drawn: CalibrationSet | None
    text: str | None
    windows: torch.Tensor | None
    tokenizer: PreTrainedTokenizerBase | None
    clock: Clock
    plan: MemoryPlan
    command: str
    ranks: Ranks
    bf16: bool

    @property
    def identity(self) -> dict:
        """What decides the written weights."""
        return {
            "version": VERSION,
            "spec": self.spec.as_dict(),
            "model": self.streamed.checkpoint.fingerprint(),
            "calibration": self.drawn and self.drawn.describe(),
            "own_rows": self.drawn and self.own_text.rows(self.drawn.tokens),
            "dtype": str(self.streamed.dtype),
            "products": "bf16" if self.bf16 else "as dtype",
            "device": self.streamed.device.type,
            "batch_tokens": BATCH_TOKENS,
            "ranks": self.ranks.size,
        }

    @property
    def own_text(self) -> OwnText:
        """What the model may add to the calibration text."""
        room = whole_model_room(self.streamed.device)
        return OwnText(self.streamed, self.spec, self.clock, room=room, bf16=self.bf16)

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        obstacle = self.drawn and self.own_text.obstacle(self.drawn.tokens)
        return [*self.kind.notes(self.streamed, self.linears), *([obstacle] if obstacle else [])]

    def settled(self, work: WorkFolder | None = None):
        """Lets the first rank settle what comes before the walk, and every rank adopt it; gives the walk's `embed`."""
        tokens, budget = self.drawn and self.drawn.tokens, self.plan.activations
        prepared = self.ranks.from_first(lambda: self.kind.prepare(self.streamed, work, tokens, budget=budget))
        return self.kind.adopt(prepared)

    def walk(self, work: WorkFolder | Scratch, embed, tokens):
        """Walks this rank's share of calibration rows."""
        walk = Walk(
            self.streamed, self.spec, self.kind.codec, work, self.clock, embed=embed,
            budget=self.plan.activations, sums_on_disk=self.plan.sums_on_disk, ranks=self.ranks, bf16=self.bf16,
        )  # fmt: skip
        walk.run(tokens)


def _check_ranks(job: _Job):
    """Refuses what several ranks cannot do together, and ranks that would do different things."""
    ranks, spec = job.ranks, job.spec
    if ranks.size == 1:
        return
    if spec.trains or spec.refined:
        raise InputError(f"{ranks.size} ranks: omniquant and --effort above fast train in one process alone")
    most = most_ranks(job.streamed, job.drawn and job.drawn.tokens)
    if ranks.size > most:
        raise InputError(f"{ranks.size} ranks: there is work for {most} (a batch of text, 32 outputs of a linear each)")
    changed = differences(ranks.from_first(lambda: job.identity), job.identity)
    if changed:
        raise InputError(f"rank {ranks.rank} would not do what rank 0 does: {'; '.join(changed)}")


def _follow(job: _Job, out: Path):
    """What other ranks than the first do."""
    scratch = Scratch(out, job.ranks.rank)
    try:
        job.walk(scratch, job.settled(), job.drawn and job.drawn.tokens)
    finally:
        scratch.close()


def _run(job: _Job, work: WorkFolder) -> dict:
    """Walks, writes aside, checks, measures and publishes; the report."""
    streamed, kind, clock = job.streamed, job.kind, job.clock
    with clock.phase("types"):
        embed = job.settled(work)
    tokens = job.drawn and job.own_text.added_to(job.drawn.tokens, work)
    share = {"budget": job.plan.activations, "bf16": job.bf16}
    FisherPass(streamed, job.spec, work, clock, **share).run(tokens)
    job.walk(work, embed, tokens)
    ScaleTuning(streamed, job.spec, kind.codec, work, clock, **share).run(tokens)
    per_linear = {name: entry for i in range(len(streamed.blocks)) for name, entry in work.report(i).items()}
    folder = work.artefact
    with clock.phase("write"):
        kind.write(folder, streamed, work)
    with clock.phase("verify"):
        packed = kind.open(folder)
        kind.verify(packed, streamed, work, per_linear)
    with clock.phase("perplexity"):
        perplexity = _measure(job, packed, work)
    with clock.phase("generate"):
        generations = _generations(job, packed)
    verdicts = kind.runtimes(job.linears, streamed.checkpoint.config["model_type"])
    report = {
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
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    _describe(folder, report, work.out)
    work.publish(folder)
    return report


def _rounded(phases, total) -> dict[str, float]:
    return {name: round(spent, 3) for name, spent in {**phases, "total": total}.items()}


def _generations(job, packed) -> dict | None:
    """What both models say after the first words of the held-out text, where the whole model is small."""
    source = job.streamed.checkpoint
    weights = sum(math.prod(source.shape(name)) for name in source.names())
    if job.windows is None or job.tokenizer is None or weights * job.streamed.dtype.itemsize > WHOLE_BYTES:
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


def _describe(folder, report, out):
    """Page and model card; a fault in them does not cost the artefact."""
    try:
        write_page(folder, report)
        write_card(folder, report, str(out))
    except Exception as error:  # drawing is a large library's work
        print(f"warning: no report.html or README.md: {type(error).__name__}: {error}", file=sys.stderr)


def _linears(streamed) -> dict[str, tuple[int, int]]:
    """(O, I) of every linear that will be quantized, by its name in the checkpoint."""
    shapes = {}
    for i in range(len(streamed.blocks)):
        for name in streamed.family.linears:
            shapes[streamed.stored_name(i, name)] = tuple(streamed.weight(i, name).shape)
    return shapes


def _calibrate(tokenizer, streamed, spec, source, samples, seqlen) -> CalibrationSet | None:
    if spec.method == "rtn":
        return None
    if tokenizer is None and not is_token_file(source):
        raise InputError(f"{streamed.checkpoint.folder}: has no usable tokenizer; calibrate with a .npy file of ids")
    drawn = sample_calibration(
        tokenizer,
        source,
        samples=samples,
        seqlen=window_length(streamed.config, seqlen),
        seed=spec.seed,
        vocab_size=streamed.config.vocab_size,
    )
    window_length(streamed.config, drawn.tokens.shape[1])
    return drawn


def _heldout(tokenizer, streamed, heldout, calibration, drawn, seqlen):
    """(its name, token windows) of the text to measure on, or (None, None)."""
    text = heldout or ("stdlib" if calibration == "stdlib" or "." in calibration else "wikitext2")
    if text == "none" or (heldout is None and tokenizer is None):
        return None, None
    if tokenizer is None and not is_token_file(text):
        raise InputError(f"{streamed.checkpoint.folder}: has no usable tokenizer; --heldout takes a .npy file of ids")
    seqlen = drawn.tokens.shape[1] if drawn is not None else window_length(streamed.config, seqlen)
    windows = heldout_tokens(
        tokenizer, text, seqlen=seqlen, max_tokens=max(HELDOUT_TOKENS, seqlen), vocab_size=streamed.config.vocab_size
    )
    window_length(streamed.config, windows.shape[1])
    return text, windows


def _finished_before(out, identity) -> Artefact:
    """What an earlier run finished; it may have been killed before it removed its work folder."""
    report = out / REPORT
    known = json.loads(report.read_bytes()) if report.is_file() else {}
    if known.get("identity") != json.loads(json.dumps(identity)):
        raise InputError(f"{out}: exists already and is not this run's; choose another --out or delete it")
    if work_folder(out).exists():
        WorkFolder(out, identity, resume=True).discard()
    return Artefact(out, known)


def _measure(job, packed, work):
    if job.windows is None:
        return None
    before, after = (
        measure_perplexity(model, job.windows, spill=work.folder / "heldout", budget=job.plan.activations, label=label)
        for model, label in ((job.streamed, "before"), (job.streamed.with_weights(packed), "after"))
    )
    return {"text": job.text, "before": before.as_dict(), "after": after.as_dict()}

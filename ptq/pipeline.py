"""From a model folder to a verified, measured artefact: the order of the steps, and nothing else.

open -> calibrate -> walk -> write aside -> read back and compare -> measure -> rename. Whatever can be refused is
refused before the walk; the output folder appears only when all of it is true.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from calibration.errors import InputError, TrainingStopped
from calibration.tokens import CalibrationSet, heldout_tokens, is_token_file, sample_calibration
from ptq.checkpoint import Checkpoint, open_checkpoint
from ptq.clock import Clock
from ptq.demo import DEMO
from ptq.evaluation.perplexity import measure_perplexity
from ptq.export.gptq import check_bits, check_packable, write_gptq
from ptq.export.gptq_tensors import GptqCodec
from ptq.export.runtimes import runtimes
from ptq.export.shards import tensor_bytes
from ptq.memory import peak_memory
from ptq.reload import GptqCheckpoint, load_tokenizer
from ptq.spec import QuantSpec
from ptq.streamed import StreamedModel
from ptq.tuning.scales import ScaleTuning
from ptq.walk import BATCH_TOKENS, Walk, digest
from ptq.workdir import WorkFolder, work_folder

VERSION = "0.1.0"
REPORT = "ptq_report.json"
HELDOUT_TOKENS = 32768  # of the before-and-after figures; ptq.evaluate reads whole texts
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    resume: bool = False,
    trust_remote_code: bool = False,
) -> Artefact:
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
        resume: Go on with an interrupted run.
        trust_remote_code: Let the checkpoint bring its own model code.

    Raises:
        InputError: Anything the user can mend; nothing is left behind.
        TrainingStopped: A block's training broke off; finished blocks and its best state stay for resume.
        OSError: The disk failed; finished blocks stay in the work folder for resume.
    """
    clock, spec = Clock(), spec or QuantSpec()
    check_bits(spec.bits)
    is_demo = model is None
    checkpoint = open_checkpoint(DEMO if is_demo else model, trust_remote_code=trust_remote_code)
    if checkpoint.quantization_config is not None:
        raise InputError(f"{checkpoint.folder}: is quantized already; quantize the full-precision model")
    out = Path(out) if out else Path("quantized") / default_name(checkpoint.folder.resolve().name, spec)
    if os.path.lexists(out) and not resume:
        raise InputError(f"{out}: exists already; choose another --out or delete it")
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device, checkpoint.config)
    streamed = StreamedModel(checkpoint, dtype=torch_dtype, device=torch_device, trust_remote_code=trust_remote_code)
    linears = _linears(streamed, spec)
    with clock.phase("calibration"):
        tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code)
        calibration = calibration or ("stdlib" if is_demo else "c4")
        drawn = _calibrate(tokenizer, streamed, spec, calibration, samples, seqlen)
        text, windows = _heldout(tokenizer, streamed, heldout, calibration, drawn, seqlen)
    budget = default_budget() if activation_budget is None else activation_budget
    if budget < 0:
        raise InputError(f"activation memory {budget} is negative; 0 keeps everything on disk")
    job = _Job(streamed, spec, linears, drawn, text, windows, clock, budget)
    if os.path.lexists(out):
        return _finished_before(out, job.identity)
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
    linears: dict[str, tuple[int, int]]
    drawn: CalibrationSet | None
    text: str | None
    windows: torch.Tensor | None
    clock: Clock
    budget: int

    @property
    def identity(self) -> dict:
        """What decides the written weights."""
        return {
            "version": VERSION,
            "spec": self.spec.as_dict(),
            "model": self.streamed.checkpoint.fingerprint(),
            "calibration": self.drawn and self.drawn.describe(),
            "dtype": str(self.streamed.dtype),
            "device": self.streamed.device.type,
            "batch_tokens": BATCH_TOKENS,
        }


def _run(job: _Job, work: WorkFolder) -> dict:
    """Walks, writes aside, checks, measures and publishes; the report."""
    checkpoint, clock, blocks = job.streamed.checkpoint, job.clock, len(job.streamed.blocks)
    codec = GptqCodec(job.spec.bits, job.spec.group_size, job.spec.checkpoint_format)
    walk = Walk(job.streamed, job.spec, codec, work, clock, budget=job.budget)
    walk.run(job.drawn and job.drawn.tokens)
    ScaleTuning(job.streamed, job.spec, codec, work, clock, budget=job.budget).run(job.drawn and job.drawn.tokens)
    per_linear = {name: entry for i in range(blocks) for name, entry in work.report(i).items()}
    folder = work.artefact
    with clock.phase("write"):
        _write(folder, checkpoint, job.spec, work, blocks)
    with clock.phase("verify"):
        packed = GptqCheckpoint(open_checkpoint(folder))
        verify(packed, checkpoint, per_linear, _changed(checkpoint, work, blocks))
    with clock.phase("perplexity"):
        perplexity = _measure(job, packed, work)
    verdicts = runtimes(job.spec, job.linears.values(), checkpoint.config["model_type"])
    report = {
        "identity": job.identity,
        "model": checkpoint.folder.resolve().name,
        "perplexity": perplexity,
        **_sizes(checkpoint, packed, job.linears),
        "seconds": {**{k: round(v, 3) for k, v in clock.seconds.items()}, "total": round(clock.total, 3)},
        "peak_memory_bytes": peak_memory(job.streamed.device),
        "resumed": work.resumed,
        "runtimes": [verdict.as_dict() for verdict in verdicts],
        "tuning": work.tuned_report(),
        "linears": per_linear,
    }
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    work.publish(folder)
    return report


def default_name(model: str, spec: QuantSpec) -> str:
    """<model>-w<bits>g<group>-<method>, without the g part for one group per row."""
    group = "" if spec.group_size == -1 else f"g{spec.group_size}"
    return f"{model}-w{spec.bits}{group}-{spec.method}"


def choose_device(name: str) -> torch.device:
    """A device by name; "auto" takes the first GPU if there is one.

    Raises:
        InputError: The name is none, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def choose_dtype(name: str, device: torch.device, config: dict) -> torch.dtype:
    """The dtype to compute in.

    Raises:
        InputError: The name is none.
    """
    if name == "auto":
        stored = config.get("dtype") or config.get("torch_dtype")
        return DTYPES.get(stored, torch.float32) if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def default_budget() -> int:
    """Bytes of activations to keep in memory unless told otherwise: two fifths of what the machine has."""
    return int(0.4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def context_length(config) -> int | None:
    """Positions the model was made for, if its config says so."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def window_length(config, seqlen: int | None) -> int:
    """The seqlen asked for, or the model's context up to 2048.

    Raises:
        InputError: It is longer than the context.
    """
    context = context_length(config)
    if seqlen is None:
        return min(2048, context or 2048)
    if context is not None and seqlen > context:
        raise InputError(f"seqlen {seqlen} is longer than the model's context of {context} positions")
    return seqlen


def _linears(streamed, spec) -> dict[str, tuple[int, int]]:
    """(O, I) of every linear that will be quantized, each checked against the format."""
    shapes = {}
    for i in range(len(streamed.blocks)):
        for name in streamed.family.linears:
            full = streamed.stored_name(i, name)
            shapes[full] = tuple(streamed.weight(i, name).shape)
            check_packable(full, *shapes[full])
    shortest = min(inputs for _, inputs in shapes.values())
    if spec.group_size > shortest:
        raise InputError(f"group {spec.group_size} is longer than the {shortest} inputs of a linear; use --group -1")
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


def _write(folder, checkpoint, spec, work, blocks):
    home = {name: i for i in range(blocks) for name, _, _ in work.layout(i)}
    packed = [part for i in range(blocks) for part in work.layout(i)]
    write_gptq(folder, checkpoint, spec, packed, lambda name: tensor_bytes(work.read(home[name], name)))


def _changed(checkpoint, work, blocks) -> dict:
    """Readers of the checkpoint's own tensors that the method changed, by name."""
    plain = set(checkpoint.names())
    names = ((i, name) for i in range(blocks) for name, _, _ in work.layout(i) if name in plain)
    return {name: lambda i=i, n=name: [bytes(tensor_bytes(work.read(i, n)))] for i, name in names}


def verify(packed: GptqCheckpoint, source: Checkpoint, per_linear: dict, changed: dict):
    """Compares the written folder with what the walk used and, byte for byte, other tensors with the source.

    Args:
        packed: The written folder.
        source: The model that was quantized.
        per_linear: Report entries of the quantized linears.
        changed: Tensors that do not have the source's bytes: functions that give theirs, by name.

    Raises:
        OSError: They differ: the disk or the memory failed.
    """
    for linear, entry in per_linear.items():
        if digest(packed.quantized(linear).dequantize()) != entry["sha256"]:
            raise OSError(f"{packed.folder}: {linear} reads back different from what was written")
    for name in source.names():
        if name.removesuffix(".weight") in per_linear:
            continue
        expected = changed[name]() if name in changed else source.raw(name)
        for ours, theirs in zip(packed.packed.raw(name), expected, strict=True):
            if ours != theirs:
                raise OSError(f"{packed.folder}: {name} reads back different from what was written")


def _measure(job, packed, work):
    if job.windows is None:
        return None
    before, after = (
        measure_perplexity(model, job.windows, spill=work.folder / "heldout", budget=job.budget, label=label)
        for model, label in ((job.streamed, "before"), (job.streamed.with_weights(packed), "after"))
    )
    return {"text": job.text, "before": before.as_dict(), "after": after.as_dict()}


def _sizes(checkpoint, packed, linears):
    weights = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    in_linears = sum(outputs * inputs for outputs, inputs in linears.values())
    parts = [f"{linear}.{part}" for linear in linears for part in ("qweight", "qzeros", "scales")]
    before = sum(checkpoint.nbytes(name) for name in checkpoint.names())
    after = sum(packed.packed.nbytes(name) for name in packed.packed.names())
    return {
        "parameters": weights,
        "bits_per_weight": {
            "before": 8 * before / weights,
            "after": 8 * after / weights,
            "linears": 8 * sum(packed.packed.nbytes(name) for name in parts) / in_linears,
        },
        "file_bytes": {
            "before": sum(path.stat().st_size for path in checkpoint.shards),
            "after": sum(path.stat().st_size for path in packed.packed.shards),
        },
    }

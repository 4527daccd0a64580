"""A run after everything that can be refused has been checked: which model, what to do to it, on what text."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from calibration.attention import use_faster_attention
from calibration.errors import InputError
from calibration.products import rounded_products
from calibration.ranks import Ranks
from calibration.tokens import CalibrationSet, heldout_tokens, is_token_file, sample_calibration
from ptq.budget import MemoryPlan, plan_memory
from ptq.checkpoint import Checkpoint, open_checkpoint
from ptq.clock import Clock
from ptq.defaults import choose_device, choose_dtype, choose_products, default_budget, whole_model_room, window_length
from ptq.demo import DEMO
from ptq.formats import GgufFormat, GptqFormat, format_of
from ptq.memory import resident_memory
from ptq.own_text import OwnText
from ptq.reload import load_tokenizer
from ptq.report.card import python_call
from ptq.spec import QuantSpec
from ptq.streamed import StreamedModel
from ptq.tuning.fisher import FisherPass
from ptq.walk import Walk, most_ranks
from ptq.workdir import Scratch, WorkFolder, differences

VERSION = "0.1.0"
HELDOUT_TOKENS = 32768  # of the before-and-after figures; ptq.evaluate reads whole texts


@dataclass(frozen=True)
class Job:
    """What quantize_model was asked for, opened.

    Attributes:
        out: The output folder-to-be.
        streamed: The full-precision model.
        spec: What to do to it.
        kind: The file format, which may have settled some of the spec.
        linears: (O, I) of every linear that will be quantized, by its name in the checkpoint.
        drawn: Calibration rows; None for methods that need none.
        text: Name of the held-out text; None without one.
        windows: Its tokens (n, T).
        tokenizer: None where the folder has none that works.
        clock: Gets the seconds of all steps.
        plan: What may be held in memory.
        command: The way to make this artefact.
        ranks: This process's place among several.
        bf16: Whether products are formed in bf16 (calibration/products.py).
    """

    out: Path
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
            "products": rounded_products() if self.bf16 else "as dtype",
            "device": self.streamed.device.type,
            "batch_tokens": self.streamed.batch_tokens,
            "ranks": self.ranks.size,
        }

    @property
    def own_text(self) -> OwnText:
        """What the model may add to the calibration text."""
        rooms = whole_model_room(self.streamed.device), self.plan.whole
        room = min(room for room in rooms if room is not None)
        return OwnText(self.streamed, self.spec, self.clock, room=room, bf16=self.bf16, ranks=self.ranks)

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        obstacle = self.drawn and self.own_text.obstacle(self.drawn.tokens)
        return [*self.kind.notes(self.streamed, self.linears), *([obstacle] if obstacle else [])]

    def quantize(self, work: WorkFolder | Scratch):
        """Quantizes every block into the work folder, each rank its share; the tokens calibrated on and `embed`."""
        with self.clock.phase("types"):
            embed = self._settled(work)
        tokens, plan = self.drawn and self.own_text.added_to(self.drawn.tokens, work), self.plan
        share = {"budget": plan.activations, "bf16": self.bf16, "ranks": self.ranks}
        FisherPass(self.streamed, self.spec, work, self.clock, **share).run(tokens)
        walk = Walk(
            self.streamed, self.spec, self.kind.codec, work, self.clock, **share, embed=embed,
            sums_on_disk=plan.sums_on_disk, limited=plan.limited,
        )  # fmt: skip
        walk.run(tokens)
        return tokens, embed

    def _settled(self, work):
        """Lets the first rank settle what comes before the walk, and every rank adopt it; gives the walk's `embed`."""
        tokens, budget = self.drawn and self.drawn.tokens, self.plan.activations
        prepared = self.ranks.from_first(lambda: self.kind.prepare(self.streamed, work, tokens, budget=budget))
        return self.kind.adopt(prepared)


def open_job(
    model, spec: QuantSpec, *, out, calibration, samples, seqlen, heldout, device, dtype, activation_budget, max_memory,
    resume, trust_remote_code, command, ranks,
) -> Job:  # fmt: skip
    """Opens the model, draws the text, plans memory; arguments are those of quantize_model.

    Raises:
        InputError: Anything the user can mend.
    """
    clock, kind = Clock(), format_of(spec)
    spec = kind.spec
    text_flags = {"calibration": calibration, "samples": samples, "seqlen": seqlen, "heldout": heldout}
    command = command or python_call(model, spec, **text_flags)
    checkpoint = _open_model(model, trust_remote_code)
    out = Path(out) if out else Path("quantized") / kind.name(checkpoint.folder.resolve().name)
    if os.path.lexists(out) and not resume:
        raise InputError(f"{out}: exists already; choose another --out or delete it")
    device = choose_device(ranks.device(device))
    streamed = StreamedModel(
        checkpoint,
        dtype=choose_dtype(dtype, device, checkpoint.config),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    use_faster_attention(streamed.model)
    linears = _linears(streamed)
    kind.check(streamed, linears)
    with clock.phase("calibration"):
        tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code)
        calibration = calibration or ("stdlib" if model is None else "c4")
        drawn = _calibrate(tokenizer, streamed, spec, calibration, samples, seqlen)
        text, windows = _heldout(tokenizer, streamed, heldout, calibration, drawn, seqlen)
    plan = _plan(activation_budget, max_memory, streamed, spec, drawn and drawn.tokens, windows)
    bf16 = choose_products(dtype, device)
    job = Job(out, streamed, spec, kind, linears, drawn, text, windows, tokenizer, clock, plan, command, ranks, bf16)
    _check_ranks(job)
    return job


def _open_model(model, trust_remote_code) -> Checkpoint:
    checkpoint = open_checkpoint(DEMO if model is None else model, trust_remote_code=trust_remote_code)
    if checkpoint.quantization_config is not None:
        raise InputError(f"{checkpoint.folder}: is quantized already; quantize the full-precision model")
    return checkpoint


def _plan(activation_budget, max_memory, streamed, spec, tokens, windows) -> MemoryPlan:
    budget = default_budget() if activation_budget is None else activation_budget
    if budget < 0:
        raise InputError(f"activation memory {budget} is negative; 0 keeps everything on disk")
    if max_memory is None:
        return MemoryPlan(budget)
    plan = plan_memory(max_memory, resident_memory(), streamed, spec, tokens, windows)
    return replace(plan, activations=min(budget, plan.activations))


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


def _check_ranks(job: Job):
    """Refuses what several ranks cannot do together, and ranks that would do different things."""
    ranks, spec = job.ranks, job.spec
    if ranks.size == 1:
        return
    if spec.trains or spec.reconstruct_epochs:
        raise InputError(f"{ranks.size} ranks: omniquant and reconstruction train a block in one process alone")
    most = most_ranks(job.streamed, job.drawn and job.drawn.tokens)
    if ranks.size > most:
        raise InputError(f"{ranks.size} ranks: there is work for {most} (a batch of text, 32 outputs of a linear each)")
    changed = differences(ranks.from_first(lambda: job.identity), job.identity)
    if changed:
        raise InputError(f"rank {ranks.rank} would not do what rank 0 does: {'; '.join(changed)}")

"""What to do to a model: one frozen record, saved in every artefact."""

from dataclasses import asdict, dataclass

from calibration.errors import InputError

METHODS = ("gptq", "rtn", "omniquant")
CHECKPOINT_FORMATS = ("gptq", "gptq_v2", "gguf")
BITS = (1, 1.58, 2, 3, 4, 5, 6, 7, 8)
COLUMN_ORDERS = ("activation", "natural")


@dataclass(frozen=True)
class QuantSpec:
    """A quantization recipe.

    Attributes:
        bits: Width of a code, 1 to 8, or 1.58: three values, -s, 0 and s.
        group_size: Input columns that share a scale; -1 for one group per row. The last group of a row may be shorter.
        method: "gptq" (Hessian-based), "rtn" (round to nearest, no calibration) or "omniquant" (clipping trained
            block by block).
        sym: Zero point fixed in the middle of the code range. The scale may then be negative, so that either tail
            can hold the extra level.
        column_order: Order in which GPTQ visits columns: "activation" (largest Hessian diagonal first, groups stay
            where they are in the file) or "natural".
        desc_act: Form groups along the activation order, which stores a shuffled g_idx that some runtimes refuse.
        damp_percent: Ridge added to the Hessian, as a fraction of its mean diagonal.
        column_block: Columns whose rounding error is propagated together; changes speed, not the result.
        refine_rounds: Rounds of refinement after GPTQ: each group its best scale (every second round alone where
            outputs are weighed), then its codes one by one.
        correction: Share of the error that arrives from earlier layers which each solve tries to undo, 0 to 1;
            above 0 a second, full-precision stream of activations is carried along.
        checkpoint_format: "gptq" (v1, stores zero-1), "gptq_v2" (stores zero) or "gguf" (llama.cpp's files).
        ggml_type: GGUF: llama.cpp's type of the linears; None for the usual one of `bits`. It decides the grid:
            bits, group_size and sym are not used.
            Or the name of one of llama.cpp's mixes, such as Q4_K_M.
        target_bpw: GGUF: bits a weight, embeddings included, of all tensors: a type is chosen for each by measurement.
        target_bytes: GGUF: the same for the bytes of the whole file.
        embed_type: GGUF: type of the token embedding; None for Q6_K, or Q8_0 where rows do not fill its blocks, or
            what a recipe or target chooses.
        head_type: GGUF: the same for a separate output head.
        pre_tokenizer: GGUF: llama.cpp's name of the tokenizer's first step; None to recognise it.
        seed: Draws the calibration windows and the order of refinement sweeps.
        epochs: OmniQuant: passes over the calibration rows in each block; 0 leaves clipping where it starts.
        train_rows: OmniQuant: calibration rows of a training step.
        lwc_lr: OmniQuant: learning rate of the clipping.
        aug_loss: OmniQuant: aim also at the full-precision block's output on the quantized stream's inputs.
        let: OmniQuant: also learn scales of channels that fold into neighbouring weights.
        let_lr: OmniQuant: learning rate of those.
        let_shift: OmniQuant: also learn shifts of channels, where there are biases to hold them.
        reconstruct_epochs: GPTQ: passes over the calibration rows in which a solved block's codes and scales are
            trained; 0 leaves them as solved.
        code_lr: Learning rate of the positions behind the codes, in codes.
        scale_lr: Learning rate of scales in a block, relative to the scale.
        own_tokens: GPTQ: tokens of text that the full-precision model writes itself, to calibrate on beside the given
            ones; 0 for none.
        fisher_tokens: GPTQ: calibration tokens whose gradients say how errors of a linear's outputs weigh against each
            other, drawn up to four times where there are fewer; 0 weighs all the same and each by itself: plain GPTQ.
        tune_epochs: GPTQ: passes in which codes and scales are tuned against the full-precision model's predictions.
        tune_lr: Learning rate of scales then, relative to the scale.
        tune_drift: How far, in codes, gradients of pure noise would carry the position behind a code then; those that
            agree carry it further, and a code turns half a code away. 0 leaves codes as they are.
    """

    bits: float = 2
    group_size: int = 128
    method: str = "gptq"
    sym: bool = True
    column_order: str = "activation"
    desc_act: bool = False
    damp_percent: float = 0.05
    column_block: int = 128
    refine_rounds: int = 8
    correction: float = 1.0
    checkpoint_format: str = "gptq"
    ggml_type: str | None = None
    target_bpw: float | None = None
    target_bytes: int | None = None
    embed_type: str | None = None
    head_type: str | None = None
    pre_tokenizer: str | None = None
    seed: int = 0
    epochs: int = 20
    train_rows: int = 1
    lwc_lr: float = 1e-2
    aug_loss: bool = False
    let: bool = False
    let_lr: float = 5e-3
    let_shift: bool = False
    reconstruct_epochs: int = 0
    code_lr: float = 2e-2
    scale_lr: float = 1e-2
    own_tokens: int = 0
    fisher_tokens: int = 1 << 13
    tune_epochs: int = 0
    tune_lr: float = 5e-3
    tune_drift: float = 0.12

    def __post_init__(self):
        rules = (
            (self.method in METHODS, f"method {self.method!r} is not one of {', '.join(METHODS)}"),
            (self.bits in BITS, f"bits {self.bits} is none of {', '.join(map(str, BITS))}"),
            (
                self.bits >= 2 or self.sym,
                f"bits {self.bits} has only the symmetric grid of {round(2**self.bits)} values: leave out --asym",
            ),
            (
                self.group_size == -1 or self.group_size > 0,
                f"group {self.group_size} is neither -1 (one group per row) nor a positive number of columns",
            ),
            (
                self.column_order in COLUMN_ORDERS,
                f"column_order {self.column_order!r} is not one of {', '.join(COLUMN_ORDERS)}",
            ),
            (
                not self.desc_act or self.column_order == "activation",
                "desc_act needs column_order 'activation'",
            ),
            (0 < self.damp_percent < 1, f"damp_percent {self.damp_percent} is not between 0 and 1"),
            (self.column_block > 0, f"column_block {self.column_block} is not positive"),
            (self.refine_rounds >= 0, f"refine_rounds {self.refine_rounds} is negative"),
            (0 <= self.correction <= 1, f"correction {self.correction} is not between 0 and 1"),
            (
                self.checkpoint_format in CHECKPOINT_FORMATS,
                f"format {self.checkpoint_format!r} is not one of {', '.join(CHECKPOINT_FORMATS)}",
            ),
            (not self.trains or self.bits >= 2, "omniquant needs 2 bits or more: fewer have no range to clip"),
            (
                not self.trains or not self.desc_act,
                "desc_act forms groups along the activation order, which omniquant does not know",
            ),
            (
                self.checkpoint_format == "gguf" or not (self.ggml_type or self.embed_type or self.head_type),
                f"types are llama.cpp's: they need format gguf, not {self.checkpoint_format}",
            ),
            (
                self.target_bpw is None or self.target_bytes is None,
                "--target-bpw and --target-size are two ways to say one thing: give one",
            ),
            (
                self.target_bpw is None or 0 < self.target_bpw <= 32,
                f"--target-bpw {self.target_bpw} is not a number of bits from 0 to 32",
            ),
            (
                not self.has_target or self.checkpoint_format == "gguf",
                f"a target size chooses llama.cpp's types: it needs format gguf, not {self.checkpoint_format}",
            ),
            (
                not self.has_target or self.ggml_type is None,
                f"type {self.ggml_type} and a target size exclude each other: the target chooses the types",
            ),
            (
                not self.has_target or self.method == "gptq",
                f"a target size is met by measuring on text: it needs method gptq, not {self.method}",
            ),
            (
                self.checkpoint_format != "gguf" or not self.desc_act,
                "desc_act forms groups along the activation order; GGUF files have no place for it",
            ),
            (self.epochs >= 0, f"epochs {self.epochs} is negative"),
            (self.train_rows > 0, f"train_rows {self.train_rows} is not positive"),
            (self.lwc_lr > 0, f"lwc_lr {self.lwc_lr} is not positive"),
            (self.let_lr > 0, f"let_lr {self.let_lr} is not positive"),
            (self.let or not self.let_shift, "let_shift needs let"),
            (self.reconstruct_epochs >= 0, f"reconstruct_epochs {self.reconstruct_epochs} is negative"),
            (self.own_tokens >= 0, f"own_tokens {self.own_tokens} is negative"),
            (self.fisher_tokens >= 0, f"fisher_tokens {self.fisher_tokens} is negative"),
            (self.tune_epochs >= 0, f"tune_epochs {self.tune_epochs} is negative"),
            (self.code_lr > 0, f"code_lr {self.code_lr} is not positive"),
            (self.scale_lr > 0, f"scale_lr {self.scale_lr} is not positive"),
            (self.tune_lr > 0, f"tune_lr {self.tune_lr} is not positive"),
            (self.tune_drift >= 0, f"tune_drift {self.tune_drift} is negative"),
            (not self.refined or self.method == "gptq", f"effort is for method gptq, not {self.method}"),
            (not self.refined or not self.desc_act, "desc_act shuffles groups, which effort above fast does not know"),
        )
        for holds, message in rules:
            if not holds:
                raise InputError(message)

    @property
    def has_target(self) -> bool:
        """Whether types are chosen under a size."""
        return self.target_bpw is not None or self.target_bytes is not None

    @property
    def label(self) -> str | None:
        """What a GGUF file is called after its model's name: the type, or the target."""
        if self.target_bpw is not None:
            return f"{self.target_bpw:g}bpw"
        return self.ggml_type if self.target_bytes is None else f"{self.target_bytes / 1e6:.0f}MB"

    @property
    def trains(self) -> bool:
        """Whether the method trains whole blocks on stored activations."""
        return self.method == "omniquant"

    @property
    def refined(self) -> bool:
        """Whether more than the solver takes part: text of the model's own, or tuning."""
        return self.own_tokens > 0 or self.trained_on

    @property
    def weighs_outputs(self) -> bool:
        """Whether gradients weigh a linear's outputs against each other."""
        return self.method == "gptq" and self.fisher_tokens > 0

    @property
    def trained_on(self) -> bool:
        """Whether gradients go on from what the solver found."""
        return self.reconstruct_epochs > 0 or self.tune_epochs > 0

    def columns_per_group(self, in_features: int) -> int:
        """Columns of a whole group in a row of `in_features` columns."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


EFFORTS = {
    "draft": {"fisher_tokens": 0, "correction": 0.0, "refine_rounds": 4},
    "fast": {},
    "balanced": {"own_tokens": 1 << 15, "fisher_tokens": 1 << 16, "tune_epochs": 2},
    "best": {"own_tokens": 12 << 15, "fisher_tokens": 1 << 17, "tune_epochs": 4},
}


def width(text: str) -> float:
    """Bits of a weight from a command line: whole, but for 1.58."""
    return float(text) if "." in text else int(text)


def omniquant_recipe(bits: int) -> dict:
    """The settings of OmniQuant's own weight-only recipes for Llama: asymmetric, and twice the epochs at 2 bits."""
    return {"sym": bits == 1, "epochs": 40 if bits == 2 else 20, "aug_loss": bits == 2}

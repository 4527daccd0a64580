"""A model whose decoder blocks are in memory one at a time, the rest only while it is needed.

The modules are Hugging Face's own, built on the meta device; weights come from a checkpoint by name and go again.
Buffers that no checkpoint stores (rotary frequencies, causal masks) are real from the start.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import isfinite

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from calibration.capture import record_block_inputs, replaced_blocks
from calibration.errors import InputError
from ptq.families import family_of

STORED_DTYPES = ("F64", "F32", "BF16", "F16")
BATCH_TOKENS = 1024  # in a wide block; bounds what a forward makes on its way
BATCH_ENTRIES = 1 << 20  # of hidden states in a narrow one, where small batches are slow


class StreamedModel:
    """Blocks of a causal language model on demand.

    Args:
        checkpoint: Gives config, model_config(), names() and pieces(name), for example a Checkpoint.
        dtype: Weights and activations are computed in this.
        device: Where a block lives while it is loaded.
        trust_remote_code: Let the checkpoint bring its own model code.
    """

    def __init__(self, checkpoint, *, dtype=torch.float32, device="cpu", trust_remote_code=False):
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, torch.device(device)
        self.family = family_of(checkpoint.config)
        self._trusted = trust_remote_code
        self.model = _build_model(checkpoint, dtype, trust_remote_code)
        self.config = config = self.model.config
        self.blocks: nn.ModuleList = self.model.get_submodule(self.family.blocks)
        shapes = {name: p.shape for name, p in self.model.named_parameters(remove_duplicate=False)}
        self._head = _name_of(self.model, self.model.get_output_embeddings()) + ".weight"
        self._embedding = _name_of(self.model, self.model.get_input_embeddings()) + ".weight"
        self._tied = bool(config.tie_word_embeddings)
        if self._tied:
            del shapes[self._head]
        self._shapes = shapes
        self._keys = _checkpoint_keys(shapes, self.model.base_model_prefix + ".", self.family.renamed, checkpoint)
        self._check_layout()
        for name, buffer in self.model.named_buffers():
            _set_tensor(self.model, name, buffer.to(self.device))

    def with_weights(self, checkpoint) -> "StreamedModel":
        """The same model with the weights of another checkpoint."""
        return StreamedModel(checkpoint, dtype=self.dtype, device=self.device, trust_remote_code=self._trusted)

    def block_name(self, i: int) -> str:
        """Dotted name of block i."""
        return f"{self.family.blocks}.{i}"

    @property
    def batch_tokens(self) -> int:
        """Tokens that go through a block at once; decides last bits, since sums run over batches."""
        return min(2 * BATCH_TOKENS, max(BATCH_TOKENS, BATCH_ENTRIES // self.config.hidden_size))

    @contextmanager
    def block(self, i: int, *, linears: bool = True) -> Iterator[nn.Module]:
        """Block i with its weights, perhaps without those of its linears; they are dropped at the end."""
        prefix = self.block_name(i) + "."
        names = [name for name in self._shapes if name.startswith(prefix)]
        left_out = () if linears else {f"{prefix}{name}.weight" for name in self.family.linears}
        with self._weights([name for name in names if name not in left_out]):
            yield self.blocks[i]

    def load_linears(self, i: int, names: Iterable[str]) -> None:
        """Loads the weights of linears of block i, where `block` has left them out; until drop_linears."""
        self._load([f"{self.block_name(i)}.{name}.weight" for name in names])

    def linear(self, i: int, name: str) -> nn.Module:
        """A linear of block i by its name inside the block."""
        return self.blocks[i].get_submodule(name)

    def weight(self, i: int, name: str) -> torch.Tensor:
        """A view (O, I) of a loaded linear's weight."""
        weight = self.linear(i, name).weight
        return weight.T if self.family.transposed else weight

    def round_linears(self, i: int, names: Iterable[str]) -> None:
        """Keeps the weights of linears of block i in bf16 alone, for `rounding_once`."""
        for name in names:
            weight = self.linear(i, name).weight
            weight.data = weight.data.bfloat16()

    def drop_linears(self, i: int, names: Iterable[str]) -> None:
        """Lets go of the weights of linears of block i that nothing reads any more."""
        for name in names:
            self._drop(f"{self.block_name(i)}.{name}.weight")

    def stored_name(self, i: int, name: str) -> str:
        """A linear's full name in the checkpoint, without ".weight"."""
        return self._keys[f"{self.block_name(i)}.{name}.weight"].removesuffix(".weight")

    def stored_key(self, i: int, parameter: str) -> str:
        """Full name in the checkpoint of a parameter of block i."""
        return self._keys[f"{self.block_name(i)}.{parameter}"]

    @contextmanager
    def outside(self, *, head: bool) -> Iterator[None]:
        """What is not in blocks, with its weights: without the output head, or with it and without the embedding.

        The two are the largest tensors of a model, and no step needs both. Where they are one, both have it.
        """
        inside, absent = self.family.blocks + ".", self._embedding if head and not self._tied else None
        names = [n for n in self._shapes if not n.startswith(inside) and n != (absent if head else self._head)]
        with self._weights(names):
            if head:
                self._tie()
            yield
        if head:
            self._tie()

    def whole(self) -> nn.Module:
        """The model with all its weights; they stay."""
        self._load(self._shapes)
        self._tie()
        return self.model

    @contextmanager
    def whole_for_a_while(self) -> Iterator[nn.Module]:
        """The same; all weights are dropped at the end."""
        try:
            yield self.whole()
        finally:
            for name in self._shapes:
                self._drop(name)
            self._tie()

    @property
    def weight_count(self) -> int:
        """Weights in all."""
        return sum(shape.numel() for shape in self._shapes.values())

    def embed(self, tokens: torch.Tensor):
        """Hidden states entering block 0 and every block's other arguments, for tokens (batch, T); inside outside()."""
        return record_block_inputs(lambda: self._base(tokens), self.blocks)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, T, vocabulary) from the last block's output (batch, T, D); inside outside(head=True)."""
        rows = hidden.flatten(0, 1)[:, None]  # each at the first position: T may pass the learned ones
        forwards = [lambda x, *args, **kwargs: x] * len(self.blocks)
        forwards[-1] = lambda x, *args, **kwargs: rows
        unused = rows.new_zeros(*rows.shape[:2], self.model.get_input_embeddings().embedding_dim)
        with replaced_blocks(self.blocks, forwards):
            return self.model(inputs_embeds=unused, use_cache=False).logits.view(*hidden.shape[:2], -1)

    def head_inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the output head reads, (batch, T, D), for the last block's output; inside outside(head=True)."""
        read = []

        def record(x):
            read.append(x)
            return x[..., :1]

        with replaced_blocks([self.model.get_output_embeddings()], [record]):
            self.logits(hidden)
        return read[0]

    @property
    def embedding_key(self) -> str:
        """The token embedding's name in the checkpoint."""
        return self._keys[self._embedding]

    @property
    def head_key(self) -> str | None:
        """A separate output head's name in the checkpoint; None where the embedding is the head."""
        return None if self._tied else self._keys[self._head]

    @property
    def embedding_weight(self) -> torch.Tensor:
        """The loaded embedding (V, D)."""
        return self.model.get_input_embeddings().weight

    @property
    def head_weight(self) -> torch.Tensor:
        """The loaded head (V, D); the embedding where that is the head."""
        return self.model.get_output_embeddings().weight

    def _base(self, tokens):
        base = getattr(self.model, self.model.base_model_prefix)
        return base(input_ids=tokens.to(self.device), use_cache=False)

    @contextmanager
    def _weights(self, names):
        self._load(names)
        try:
            yield
        finally:
            for name in names:
                self._drop(name)

    def _load(self, names):
        for name, tensor in self._read(names):
            _set_tensor(self.model, name, nn.Parameter(tensor, requires_grad=False))

    def _tie(self):
        if self._tied:
            self.model.get_output_embeddings().weight = self.model.get_input_embeddings().weight

    def _drop(self, name):
        empty = torch.empty(self._shapes[name], dtype=self.dtype, device="meta")
        _set_tensor(self.model, name, nn.Parameter(empty, requires_grad=False))

    def _check_layout(self):
        """Shapes and dtypes of all tensors, before hours of work on the first of them."""
        for name, expected in self._shapes.items():
            key = self._keys[name]
            shape, dtype = self.checkpoint.shape(key), self.checkpoint.dtype(key)
            if shape != tuple(expected):
                raise InputError(
                    f"{self.checkpoint.folder}: {key} has shape {shape}; config.json asks for {tuple(expected)}"
                )
            if dtype not in STORED_DTYPES:
                raise InputError(
                    f"{self.checkpoint.folder}: {key} is stored as {dtype}, not one of {', '.join(STORED_DTYPES)}"
                )

    def _read(self, names):
        """(name, tensor) of each; the file's dtype and ours are never both held for a whole tensor."""
        for name in names:
            key, filled = self._keys[name], 0
            tensor = torch.empty(self._shapes[name], dtype=self.dtype, device=self.device)
            for piece in self.checkpoint.pieces(key):
                if not all(map(isfinite, piece.aminmax())):  # NaN comes through; torch.isfinite would copy twice
                    raise InputError(
                        f"{self.checkpoint.folder}: {key} holds NaN or infinite weights: the checkpoint is damaged"
                    )
                tensor.view(-1)[filled : filled + len(piece)].copy_(piece)
                filled += len(piece)
            yield name, tensor


def _build_model(checkpoint, dtype, trust_remote_code) -> nn.Module:
    """The model of a checkpoint's config with parameters on the meta device."""
    try:
        config = checkpoint.model_config(trust_remote_code=trust_remote_code)
        _check_blocks(config, checkpoint)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config  # the checkpoint gives plain weights
        config.dtype = dtype
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except Exception as error:  # a wrong value surfaces as whatever it breaks inside transformers
        file, cause = checkpoint.folder / "config.json", " ".join(str(error).split()) or "no reason given"
        raise InputError(f"{file}: transformers cannot build this model ({type(error).__name__}: {cause})") from error
    return model.eval().requires_grad_(False)


def _check_blocks(config, checkpoint):
    """Refuses none, and more than a checkpoint of so many tensors can have, which would take forever to build."""
    blocks, tensors = getattr(config, "num_hidden_layers", 0), len(checkpoint.names())
    if not 0 < blocks <= tensors:
        raise InputError(
            f"{checkpoint.folder / 'config.json'}: num_hidden_layers is {blocks}; the checkpoint has {tensors} tensors"
        )


def _checkpoint_keys(names, prefix, renamed, checkpoint) -> dict[str, str]:
    """Each parameter's name in the checkpoint: hub files leave out or add the base model's prefix."""
    stored = set(checkpoint.names())
    keys, missing = {}, []
    for name in names:
        others = [old + name.removeprefix(new) for new, old in renamed if name.startswith(new)]
        found = [key for key in (name, name.removeprefix(prefix), prefix + name, *others) if key in stored]
        if found:
            keys[name] = found[0]
        else:
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"the checkpoint in {checkpoint.folder} lacks {', '.join(missing[:3])}{more}")
    return keys


def _name_of(model, module):
    return next(name for name, candidate in model.named_modules() if candidate is module)


def _set_tensor(model, name, tensor):
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = tensor
    else:
        module._buffers[leaf] = tensor

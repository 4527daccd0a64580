"""The types of one model's tensors, settled before the first block is solved, and the bytes of embedding and head.

A type is given (by name or recipe), or chosen under a target size from what survey and knapsack say. Both what was
chosen and the solved tables are kept in the work folder, so that a resumed run goes on with the same.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import prod

import torch

from calibration.errors import InputError
from ptq.evaluation.stream import batches_of
from ptq.export.gguf.layout import FLOAT_TYPES, EncodedTensor, Layout
from ptq.export.gguf.types import BY_NAME
from ptq.export.gguf.writer import header_bytes, padded
from ptq.grids.blocks import BLOCK_GRIDS
from ptq.mixture.assignment import candidates, fitting, recipe_types
from ptq.mixture.outer import decode_table, encode_table, head_hessian, with_ridge
from ptq.mixture.plan import Sizes, best_types, check_reach, pareto_table
from ptq.mixture.recipes import HEAD, RECIPES
from ptq.mixture.sensitivity import Survey, split_rows

OUTER_TYPE = HEAD  # of embedding and head, where nobody says: hardly worse than F16
PLAN, TABLES = "plan", "tables"  # parts of the work folder


class Mixture:
    """What each tensor of a model may be, and what it becomes.

    Args:
        model: StreamedModel.
        spec: QuantSpec.
        linears: (O, I) of each quantized linear, by its name in the checkpoint.

    Attributes:
        choices: The types that each may get, narrowest first, by the linear's name or the table's.
        narrower: (name, type asked for, type that fits, inputs) of those whose rows do not fill the blocks of a given
            type.

    Raises:
        InputError: Rows that no type holds, named.
    """

    def __init__(self, model, spec, linears: Mapping[str, tuple[int, int]]):
        self.model, self.spec = model, spec
        keys = [key for key in (model.embedding_key, model.head_key) if key]
        self._tables = {key: tuple(model.checkpoint.shape(key)) for key in keys}
        self._shapes = {**linears, **self._tables}
        given, self.choices, self.narrower = self._given(linears), {}, []
        for name, (_, inputs) in self._shapes.items():
            try:
                if name not in given:
                    self.choices[name] = candidates(inputs)
                elif (wanted := given[name]) not in FLOAT_TYPES:
                    self.choices[name] = (used,) = (fitting(wanted, inputs),)
                    if used != wanted:
                        self.narrower.append((name, wanted, used, inputs))
            except InputError as error:
                raise InputError(f"{name}: {error}") from None

    def _given(self, linears) -> dict[str, str]:
        """Types that are not chosen by measurement."""
        spec, model, types = self.spec, self.model, {}
        outer = {model.embedding_key: spec.embed_type}
        if model.head_key:
            outer[model.head_key] = spec.head_type
        if not spec.has_target:
            recipe = None if spec.ggml_type in BLOCK_GRIDS else RECIPES[spec.ggml_type]
            types = recipe_types(recipe, model.config, linears) if recipe else dict.fromkeys(linears, spec.ggml_type)
            if model.head_key:
                types[model.embedding_key] = recipe.ggml_type if recipe else OUTER_TYPE
            types[model.head_key or model.embedding_key] = OUTER_TYPE
        return types | {name: kind for name, kind in outer.items() if kind}

    def check_target(self, *, config, float_type: str, **described):
        """Counts what each choice would take, and refuses a target that cannot be met.

        Args:
            config: The transformers config of the model.
            float_type: Of matrices that are not encoded.
            described: tokenizer, pre_tokenizer and extra, as for write_gguf.

        Raises:
            InputError: Naming what can be reached.
        """
        spec, source = self.spec, self.model.checkpoint
        whole = spec.target_bytes is not None
        taken = padded if whole else int
        least = {self._weight(name): _placeholder(kinds[0]) for name, kinds in self.choices.items()}
        tensors = Layout(source, config, float_type).tensors(least)
        of = {name: {kind: taken(self._nbytes(name, kind)) for kind in kinds} for name, kinds in self.choices.items()}
        fixed = sum(taken(tensor.nbytes) for tensor in tensors) - sum(min(sizes.values()) for sizes in of.values())
        if whole:
            fixed += header_bytes(source, least, config=config, float_type=float_type, **described)
        self.sizes = Sizes(of, fixed, sum(prod(source.shape(name)) for name in source.names()))
        if whole:
            self.budget = spec.target_bytes
            check_reach(self.sizes, self.budget, f"--target-size {self.budget} bytes", lambda n: f"{n} bytes")
        else:
            self.budget = int(spec.target_bpw * self.sizes.weights / 8)
            bits = lambda n: f"{self.sizes.bits(n):.4f}"  # noqa: E731
            check_reach(self.sizes, self.budget, f"--target-bpw {spec.target_bpw:g}", bits)

    def settle(self, work, tokens: torch.Tensor | None, *, budget: int | None) -> dict[str, str]:
        """The type of each linear and table; embedding and head are solved and kept.

        Args:
            work: WorkFolder.
            tokens: (n, T) calibration rows; None for methods that need none.
            budget: Bytes of activations kept in memory; None for no limit.
        """
        hessians = None
        if self.spec.has_target and not work.has_part(PLAN):
            hessians = self._hessians(work, tokens, budget)
            work.save_part(PLAN, {}, self._measured(work, tokens, hessians, budget))
        chosen = work.part_report(PLAN)["types"] if self.spec.has_target else {}
        types = {name: chosen.get(name, kinds[0]) for name, kinds in self.choices.items()}
        if not work.has_part(TABLES):
            hessians = hessians or self._hessians(work, tokens, budget)
            tables = {name: types[name] for name in self._tables if name in types}
            encoded = {f"{name}.{kind}": self._encode(name, kind, hessians[name]) for name, kind in tables.items()}
            work.save_part(TABLES, encoded, tables)
        return types

    def _measured(self, work, tokens, hessians, budget) -> dict:
        """Types that fit the target, and what they were chosen by."""
        survey = Survey(
            self.model, self.spec, self.choices, hessians, self.sizes.bits(self.budget),
            spill=work.folder / "activations" / "survey", budget=budget,
        )  # fmt: skip
        costs = survey.run(tokens)
        types = best_types(self.sizes, costs, self.budget)
        rows = [row.as_dict() for row in pareto_table(self.sizes, costs, self.budget)]
        kl, size = sum(costs[name][kind] for name, kind in types.items()), self.sizes.total(types)
        found = {"budget": self.budget, "size": size, "bits": self.sizes.bits(size), "kl": kl}
        return {**found, "types": types, "table": rows, "costs": costs}

    def _hessians(self, work, tokens, budget) -> dict[str, torch.Tensor | None]:
        """What each table that gets blocks is solved on; None to round to nearest."""
        names = [name for name in self._tables if name in self.choices]
        reader = self.model.head_key or self.model.embedding_key
        if tokens is None or reader not in names:
            return dict.fromkeys(names)
        spill = work.folder / "activations" / "head"
        H = head_hessian(self.model, batches_of(split_rows(tokens)[0]), spill=spill, budget=budget)
        return dict.fromkeys(names) | {reader: H if self.model.head_key else with_ridge(H)}

    def _encode(self, name, kind, H):
        W = self.model.checkpoint.read([name])[name].to(self.model.device)
        return torch.from_numpy(encode_table(W, BLOCK_GRIDS[kind], H, self.spec))

    def embed(self, work) -> Callable[[torch.Tensor], None] | None:
        """What overwrites a loaded embedding with the file's values; None where they are the model's own."""
        name = self.model.embedding_key
        kind = work.part_report(TABLES).get(name)
        if kind is None:
            return None
        return partial(decode_table, work.part_tensor(TABLES, f"{name}.{kind}").numpy(), kind)

    def tables(self, work) -> dict[str, EncodedTensor]:
        """Embedding and head, as far as they have blocks, for write_gguf."""
        kinds = work.part_report(TABLES)
        read = lambda key: work.part_tensor(TABLES, key).numpy()  # noqa: E731
        return {n: EncodedTensor(BY_NAME[k].number, lambda key=f"{n}.{k}": read(key)) for n, k in kinds.items()}

    def _weight(self, name):
        return name if name in self._tables else f"{name}.weight"

    def _nbytes(self, name, kind):
        outputs, inputs = self._shapes[name]
        return outputs * BY_NAME[kind].row_bytes(inputs)


def _placeholder(kind):
    return EncodedTensor(BY_NAME[kind].number, bytes)

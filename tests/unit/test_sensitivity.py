"""Measured costs of types against whole models in which one tensor is another."""

from functools import partial

import pytest
import torch
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM

from calibration.hessian import Hessian
from ptq import QuantSpec
from ptq.checkpoint import open_checkpoint
from ptq.export.gguf.codecs import unpack
from ptq.grids.blocks import BLOCK_GRIDS
from ptq.mixture.outer import encode_table, head_hessian, with_ridge
from ptq.mixture.sensitivity import Survey, split_rows
from ptq.quantizers.gptq import gptq
from ptq.streamed import StreamedModel

TYPES = ("Q2_0", "IQ4_NL", "Q8_0")
SPEC = QuantSpec(checkpoint_format="gguf", target_bpw=2.5, refine_rounds=1)


class Case:
    """A tiny model, its survey, and the same model whole."""

    def __init__(self, folder, tied):
        make_tiny("llama", folder, tie=tied)
        self.model = StreamedModel(open_checkpoint(folder))
        self.whole = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokens = torch.randint(0, 300, (8, 32), generator=torch.Generator().manual_seed(0))
        self.solved, self.probed = split_rows(self.tokens)
        self.linears = [self.model.stored_name(i, n) for i in range(2) for n in self.model.family.linears]
        H = head_hessian(self.model, [self.solved])
        self.tables = {self.model.embedding_key: with_ridge(H)} if tied else {
            self.model.embedding_key: None, self.model.head_key: H
        }  # fmt: skip
        types = dict.fromkeys([*self.linears, *self.tables], TYPES)
        self.costs = Survey(self.model, SPEC, types, self.tables, 2.5).run(self.tokens)
        self.expected = self.predictions()

    @torch.no_grad()
    def predictions(self):
        return self.whole(self.probed).logits.double().log_softmax(-1)

    def divergence(self, name, values):
        """KL with one weight replaced."""
        weight = self.whole.get_parameter(name)
        original = weight.detach().clone()
        weight.data.copy_(values)
        found = self.predictions()
        weight.data.copy_(original)
        return float((self.expected.exp() * (self.expected - found)).sum(-1).mean())


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "separate"])
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp("model"), request.param)


@torch.no_grad()
def test_embedding_and_head(case):
    for name, H in case.tables.items():
        W = case.whole.get_parameter(name).detach()
        for kind in TYPES:
            values = unpack(encode_table(W, BLOCK_GRIDS[kind], H, SPEC), kind).dequantize()
            assert case.costs[name][kind] == pytest.approx(case.divergence(name, values), rel=1e-3, abs=1e-6)


@torch.no_grad()
def test_linears(case):
    """The probe's KL is that of the whole model; other types follow their errors."""
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"):
        module, hessian = case.whole.get_submodule(name), Hessian(128 if "down" in name else 64)
        handle = module.register_forward_pre_hook(partial(lambda h, _, args: h.add(args[0]), hessian))
        case.whole(case.solved)
        handle.remove()
        H, W = hessian.finalise()[0], module.weight.detach()
        solved = {kind: gptq(W, H.clone(), SPEC, grid=BLOCK_GRIDS[kind]) for kind in TYPES}
        measured = case.divergence(f"{name}.weight", solved["Q2_0"].quantized.dequantize())
        assert case.costs[name]["Q2_0"] == pytest.approx(measured, rel=1e-2)
        for kind in TYPES:
            ratio = float(solved[kind].loss.sum() / solved["Q2_0"].loss.sum())
            assert case.costs[name][kind] / case.costs[name]["Q2_0"] == pytest.approx(ratio, rel=1e-2)


def test_text_to_measure_on_is_not_solved_on():
    solved, probed = split_rows(torch.arange(128 * 512).view(128, 512))
    assert solved.shape == (32, 512) and probed.shape == (4, 512) and int(solved.max()) < int(probed.min())
    assert [len(part) for part in split_rows(torch.zeros(1, 64))] == [1, 1]

"""The walk with types that differ inside a stage, and with an embedding that is not the model's own."""

import pytest
import torch
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM

from calibration.hessian import Hessian
from ptq import QuantSpec
from ptq.checkpoint import open_checkpoint
from ptq.clock import Clock
from ptq.formats.gguf import GgufCodec
from ptq.grids.blocks import BLOCK_GRIDS
from ptq.quantizers.gptq import gptq
from ptq.streamed import StreamedModel
from ptq.walk import Walk
from ptq.workdir import WorkFolder

SPEC = QuantSpec(checkpoint_format="gguf", correction=0.0, refine_rounds=1, fisher_tokens=0)
TOKENS = torch.randint(0, 300, (6, 32), generator=torch.Generator().manual_seed(0))
Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("model"), blocks=1)


def walked(folder, out, tokens, types=None, embed=None):
    """Every linear's values after a walk."""
    model = StreamedModel(open_checkpoint(folder))
    names = [model.stored_name(0, name) for name in model.family.linears]
    codec, work = GgufCodec(dict.fromkeys(names, "Q4_0") | (types or {})), WorkFolder(out, {}, resume=False)
    Walk(model, SPEC, codec, work, Clock(), embed=embed).run(tokens)
    packed = work.load_block(0)
    work.discard()
    return {key.rpartition(".")[0]: codec.unpack({key.rpartition(".")[2]: rows}) for key, rows in packed.items()}


@torch.no_grad()
def test_each_type_of_a_stage_is_solved_on_the_same_inputs(folder, tmp_path):
    found = walked(folder, tmp_path / "out", TOKENS, {K: "Q8_0"})
    whole, hessian = AutoModelForCausalLM.from_pretrained(folder).eval(), Hessian(64)
    whole.get_submodule(Q).register_forward_pre_hook(lambda _, args: hessian.add(args[0]))
    whole(TOKENS)
    H = hessian.finalise()[0]
    for names, kind in (((Q, V), "Q4_0"), ((K,), "Q8_0")):
        weights = [whole.get_submodule(name).weight for name in names]
        solved = gptq(weights, H.clone(), SPEC, grid=BLOCK_GRIDS[kind]).quantized.dequantize()
        together = torch.cat([found[name].dequantize() for name in names])
        assert found[names[0]].grid.name == kind
        torch.testing.assert_close(together, solved, rtol=0, atol=0)


def test_the_quantized_stream_begins_with_the_embedding_of_the_file(folder, tmp_path):
    """A table upside down gives what upside-down tokens give."""
    upside_down = walked(folder, tmp_path / "one", TOKENS, embed=lambda table: table.copy_(table.flip(0)))
    expected = walked(folder, tmp_path / "two", 299 - TOKENS)
    plain = walked(folder, tmp_path / "three", TOKENS)
    for name, tensor in expected.items():
        assert torch.equal(upside_down[name].dequantize(), tensor.dequantize())
        assert not torch.equal(plain[name].dequantize(), tensor.dequantize())

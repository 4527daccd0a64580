"""One test a rule: what each runtime refuses, and what it does not."""

import pytest

from ptq.export import runtimes as module
from ptq.export.gptq import quantization_config
from ptq.export.runtimes import UNREAD, runtimes
from ptq.spec import QuantSpec

LLAMA = [(4096, 4096), (11008, 4096), (4096, 11008)]
BABYLLAMA = [(128, 128), (352, 128), (128, 352)]  # no group but 32 divides 352
HF, GPTQMODEL, VLLM, EXLLAMA = "transformers + GPTQModel", "GPTQModel", "vLLM (Marlin kernels)", "ExLlamaV2"


def verdicts(shapes=LLAMA, **spec):
    return {verdict.name: verdict for verdict in runtimes(QuantSpec(**spec), shapes)}


def loading(shapes=LLAMA, **spec):
    return {name for name, verdict in verdicts(shapes, **spec).items() if verdict.loads}


def test_four_bits_symmetric_load_everywhere():
    for group_size in (32, 64, 128):
        for desc_act in (False, True):
            assert loading(bits=4, group_size=group_size, desc_act=desc_act) == {HF, GPTQMODEL, VLLM, EXLLAMA}


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_low_widths_load_in_gptqmodel_alone(bits):
    found = verdicts(bits=bits, checkpoint_format="gptq_v2")
    assert {name for name, verdict in found.items() if verdict.loads} == {HF, GPTQMODEL}
    assert f"{max(bits, 2)}-bit weights; Marlin has 4 and 8" in found[VLLM].why
    assert f"{max(bits, 2)}-bit weights; its GPTQ kernel has 4" in found[EXLLAMA].why


def test_eight_bits():
    assert loading(bits=8) == {HF, GPTQMODEL, VLLM}


@pytest.mark.parametrize(("bits", "fails"), [(2, False), (3, False), (4, True), (8, False)])
@pytest.mark.parametrize("group_size", [64, 128])
def test_ragged_groups_fail_in_the_four_bit_cpu_kernel_alone(bits, fails, group_size):
    found = verdicts(BABYLLAMA, bits=bits, group_size=group_size)
    for name in (HF, GPTQMODEL):
        assert found[name].loads is not fails
        assert fails == ("needs groups of 32, 64 or 128 that divide" in found[name].why)
    assert "dividing the inputs" in found[VLLM].why


@pytest.mark.parametrize(("inputs", "fits"), [(128, True), (256, True), (352, False), (4096, False)])
def test_whole_rows_of_four_bits_are_groups_of_all_inputs_to_that_kernel(inputs, fits):
    assert ({HF, GPTQMODEL} <= loading([(64, inputs)], bits=4, group_size=-1)) is fits
    assert {HF, GPTQMODEL} <= loading([(64, inputs)], bits=2, group_size=-1)
    assert VLLM in loading(bits=4, group_size=-1) and EXLLAMA in loading(bits=4, group_size=-1)


def test_small_and_large_groups_of_four_bits():
    assert not {HF, GPTQMODEL} & loading(bits=4, group_size=16)
    assert {HF, GPTQMODEL} <= loading(bits=3, group_size=16)
    for shapes in (LLAMA, BABYLLAMA):  # another kernel, which takes ragged groups too
        assert {HF, GPTQMODEL} <= loading(shapes, bits=4, group_size=256)


def test_four_bit_groups_that_divide_load_in_gptqmodel():
    assert {HF, GPTQMODEL, EXLLAMA} == loading(BABYLLAMA, bits=4, group_size=32)


def test_group_sizes_without_a_kernel():
    found = verdicts([(96, 96)], bits=4, group_size=48)
    assert not any(verdict.loads for verdict in found.values())
    for name in found:
        assert "group 48; " in found[name].why
    assert VLLM not in loading(bits=4, group_size=256) and EXLLAMA in loading(bits=4, group_size=256)
    assert EXLLAMA not in loading(bits=4, group_size=16)


@pytest.mark.parametrize(
    ("producers", "takes"),
    [
        (["ptq:0.1.0"], False),
        (["ptq:0.1.0", "gptqmodel:0.8.9"], False),
        (["gptqmodel:0.9.0"], True),
        (["ptq:0.1.0", "gptqmodel:7.6.0"], True),
    ],
)
def test_gptqmodel_asks_who_wrote_an_asymmetric_v1_file(producers, takes, monkeypatch):
    monkeypatch.setattr(
        module, "quantization_config", lambda spec: quantization_config(spec) | {"meta": {"quantizer": producers}}
    )
    for spec in (dict(bits=4, sym=False), dict(bits=1)):  # the file calls a one-bit grid asymmetric
        found = verdicts(**spec)
        assert found[GPTQMODEL].loads is takes and ("use gptq_v2" in found[GPTQMODEL].why) is not takes
        assert found[HF].loads
        assert verdicts(**spec, checkpoint_format="gptq_v2")[GPTQMODEL].loads
    assert verdicts(bits=4)[GPTQMODEL].loads


def test_marlin_has_no_zero_points_and_does_not_read_those_of_symmetric_files():
    assert "zero points are not symmetric" in verdicts(bits=4, sym=False)[VLLM].why
    assert verdicts(bits=4, checkpoint_format="gptq_v2")[VLLM].loads


@pytest.mark.parametrize(("shape", "fits"), [((64, 128), True), ((96, 128), False), ((64, 64), False)])
def test_marlin_tiles(shape, fits):
    verdict = verdicts([*LLAMA, shape], bits=4, group_size=32)[VLLM]
    assert verdict.loads is fits and ("multiples of 64" in verdict.why) is not fits


def test_exllama_reads_every_file_as_v1():
    assert "gptq_v2 as v1" in verdicts(bits=4, checkpoint_format="gptq_v2")[EXLLAMA].why
    assert verdicts(bits=4, sym=False)[EXLLAMA].loads


@pytest.mark.parametrize(
    ("model_type", "refuses"),
    [("gpt2", HF), ("gpt_bigcode", HF), ("phi3", GPTQMODEL), ("gpt_neox", GPTQMODEL), ("llama", None)],
)
def test_architectures_that_a_runtime_gets_wrong(model_type, refuses):
    found = {verdict.name: verdict for verdict in runtimes(QuantSpec(bits=4), LLAMA, model_type)}
    assert {name for name, verdict in found.items() if not verdict.loads} == {refuses} - {None}
    assert refuses is None or found[refuses].why == UNREAD[refuses, model_type]


def test_verdicts_for_the_report():
    assert [sorted(verdict.as_dict()) for verdict in runtimes(QuantSpec(), LLAMA)] == [["loads", "name", "why"]] * 4

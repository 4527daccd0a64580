"""GGUF files are read as the package writes them; anything else is one InputError, quickly and in bounded memory."""

import copy
import math
import random
import struct
import time
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import pytest
import torch
from gguf_damage import damage

from calibration.capture import run_block
from calibration.errors import InputError
from ptq.export.gguf.types import dequantize
from ptq.gguf.config import read_config
from ptq.gguf.file import GgufFile
from ptq.gguf.tokenizer import read_tokenizer
from ptq.gguf.weights import GgufCheckpoint
from ptq.streamed import StreamedModel

WIDTH, HIDDEN, HEADS, VOCAB = 32, 64, 2, 24
TENSORS = {
    "token_embd.weight": (VOCAB, WIDTH),
    "output_norm.weight": (WIDTH,),
    "blk.0.attn_norm.weight": (WIDTH,),
    "blk.0.ffn_norm.weight": (WIDTH,),
    "blk.0.attn_q.weight": (WIDTH, WIDTH),
    "blk.0.attn_k.weight": (WIDTH, WIDTH),
    "blk.0.attn_v.weight": (WIDTH, WIDTH),
    "blk.0.attn_output.weight": (WIDTH, WIDTH),
    "blk.0.ffn_gate.weight": (HIDDEN, WIDTH),
    "blk.0.ffn_up.weight": (HIDDEN, WIDTH),
    "blk.0.ffn_down.weight": (WIDTH, HIDDEN),
}


def write_small(path):
    """A Llama of one block whose matrices are Q8_0, with a SentencePiece vocabulary; by the package alone."""
    writer, generator = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        "\u2581",
        *"abcdefghij",
        "ab",
        "abc",
        "\u2581a",
        *(f"<0x{i:02X}>" for i in range(7)),
    ]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(VOCAB)])
    writer.add_token_types([2, 3, 3] + [1] * 14 + [6] * 7)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    values = {name: generator.normal(size=shape).astype(np.float32) for name, shape in TENSORS.items()}
    for name, value in values.items():
        number = gguf.GGMLQuantizationType.Q8_0 if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(value, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("gguf") / "small.gguf")


@pytest.fixture
def scratch(tmp_path):
    """A path in memory where there is such a place: files are written by the thousand."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder) / "damaged.gguf"


def read_everything(path):
    """What evaluation reads of a file before transformers builds a model."""
    file = GgufFile(path)
    for name, tensor in file.tensors.items():
        with np.errstate(all="ignore"):
            try:
                dequantize(file.rows(name), tensor.ggml_type.number)
            except NotImplementedError:
                pass
    read_config(file)
    read_tokenizer(file)


def test_the_package_reads_the_same(small):
    ours, theirs = GgufFile(small), gguf.GGUFReader(small)
    for tensor in theirs.tensors:
        stored = ours.tensors[tensor.name]
        assert (stored.ggml_type.number, stored.start) == (tensor.tensor_type.value, tensor.data_offset)
        assert stored.shape == tuple(tensor.shape[::-1].tolist())
        assert ours.rows(tensor.name).tobytes() == tensor.data.tobytes()
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for key, value in ours.metadata.items():
        expected = theirs.fields[key].contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, key
    assert ours.rows("blk.0.ffn_up.weight", slice(3, 5)).tobytes() == ours.rows("blk.0.ffn_up.weight")[3:5].tobytes()


def test_it_is_a_model(small):
    weights = GgufCheckpoint(small)
    assert weights.config["num_hidden_layers"] == 1 and weights.config["tie_word_embeddings"]
    assert weights.shape("model.layers.0.mlp.down_proj.weight") == (WIDTH, HIDDEN)
    # "_abc_a": the merge with the best score is "ab", then "abc", then "_a".
    assert read_tokenizer(weights.file)("abc a").input_ids == [1, 3, 15, 16]


def test_a_file_of_ten_bytes_and_one_of_every_length(small, tmp_path):
    whole, cut = small.read_bytes(), tmp_path / "cut.gguf"
    for length in (0, 3, 4, 7, 8, 10, 16, 23, 24, 25, 100, 1000, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError, match="cut.gguf: not a whole GGUF file"):
            GgufFile(cut)


def refused(path, content) -> bool:
    """Reads a damaged copy; whether it was refused, in one line."""
    path.write_bytes(content)
    try:
        read_everything(path)
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return True
    return False


@pytest.mark.parametrize("copies", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_files(small, scratch, copies):
    whole, generator, count, slowest = small.read_bytes(), random.Random(copies), 0, 0.0
    for _ in range(copies):
        content, start = damage(whole, generator), time.thread_time()
        count += refused(scratch, content)
        slowest = max(slowest, time.thread_time() - start)
    print(f"{copies} damaged files: {count} refused, the slowest took {slowest:.2f} s")
    assert copies / 2 < count < copies  # a flipped weight is still a weight
    assert slowest < 2


def test_damage_never_allocates_more_than_the_file_justifies(small, scratch):
    whole, generator = small.read_bytes(), random.Random(1)
    read_everything(small)
    tracemalloc.start()
    for _ in range(300):
        refused(scratch, damage(whole, generator))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * len(whole)  # a whole file read takes about 40 times its 26 kB, most of it the tokenizer's JSON


@torch.no_grad()
def test_damaged_numbers_build_no_model(small, scratch):
    """Beyond the file: what transformers is given to build stays within it, or is refused, and what it builds runs."""
    whole, generator, ran = small.read_bytes(), random.Random(2), 0
    first, last = whole.index(b"llama.context_length"), whole.index(b"tokenizer.ggml.model")
    for _ in range(60):
        data = bytearray(whole)
        place = generator.randrange(first, last)
        number = generator.choice([0, 1, 3, 2**31, 2**32 - 1, generator.getrandbits(32)])
        data[place : place + 4] = struct.pack("<I", number)
        scratch.write_bytes(data)
        try:
            model = StreamedModel(GgufCheckpoint(scratch))
            with model.outside(head=False):
                hidden, arguments = model.embed(torch.arange(8)[None])
            with model.block(0) as block:
                run_block(block, hidden, arguments[0])
            ran += 1
        except InputError as error:
            assert "\n" not in str(error)
    assert 0 < ran < 60


OTHER_VALUES = [None, 0, 1, 3, -1, 2**64 - 1, 0.5, math.nan, math.inf, "", "x", "yarn", "qwen2", True, False, [],
                ["a b"], ["a"], np.array([1, 2]), np.array([], np.int32), np.array([0.5])]  # fmt: skip


def test_values_of_any_type_under_any_key(small):
    whole = GgufFile(small)
    names = [*whole.metadata, "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.dimension_count",
             "llama.attention.key_length", "llama.rope.scaling.attn_factor", "tokenizer.ggml.merges",
             "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix",
             "tokenizer.huggingface.json"]  # fmt: skip
    for name in names:
        for value in OTHER_VALUES:
            file = copy.copy(whole)
            file.metadata = whole.metadata | {name: value}
            for read in (read_config, read_tokenizer):
                try:
                    read(file)
                except InputError as error:
                    assert "\n" not in str(error) and str(small) in str(error)
    file.metadata = whole.metadata | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    for value in OTHER_VALUES:
        file.metadata["tokenizer.ggml.merges"] = value
        try:
            read_tokenizer(file)
        except InputError as error:
            assert "\n" not in str(error)


def write_raw(path, keys=(), tensors=(), data=b"", *, version=3):
    """A file from (key, type, packed value) and (name, shape, type, offset), whatever they are."""
    text = lambda value: struct.pack("<Q", len(value)) + value.encode()  # noqa: E731
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    head += b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in keys)
    for name, shape, number, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], number, offset)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"version": 1}, "version 1"),
        ({"version": 3 << 24}, "big-endian"),
        ({"keys": [("a", 4, bytes(4)), ("a", 4, bytes(4))]}, "'a' for the second time"),
        ({"keys": [("a", 13, bytes(8))]}, "a value of type 13"),
        ({"keys": [("a", 9, struct.pack("<IQ", 9, 1) + bytes(20))]}, "an array of type 9"),
        ({"keys": [("a", 9, struct.pack("<IQ", 8, 2**40))]}, "a count of 1099511627776"),
        ({"keys": [("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")]}, "not UTF-8"),
        ({"keys": [("general.alignment", 4, struct.pack("<I", 0))]}, "an alignment of 0"),
        ({"keys": [("general.alignment", 4, struct.pack("<I", 33))]}, "an alignment of 33"),
        ({"keys": [("split.count", 2, struct.pack("<H", 3))]}, "one part of several"),
        ({"tensors": [("t", (2,), 0, 32)], "data": bytes(64)}, "'t' outside its place"),
        ({"tensors": [("t", (2**40, 2**40), 0, 0)]}, "'t' outside its place"),
        ({"tensors": [("t", (2,), 0, 0), ("t", (2,), 0, 32)], "data": bytes(64)}, "'t' for the second time"),
        ({"tensors": [("t", (1,) * 5, 0, 0)], "data": bytes(64)}, "5 dimensions"),
        ({"tensors": [("t", (2, 0), 0, 0)], "data": bytes(64)}, "shape"),
        ({"tensors": [("t", (2, 48), 8, 0)], "data": bytes(640)}, "Q8_0 with shape"),
        ({"tensors": [("t", (32,), 99, 0)], "data": bytes(64)}, "unknown type 99"),
    ],
)
def test_every_rule(tmp_path, content, words):
    with pytest.raises(InputError, match=words):
        GgufFile(write_raw(tmp_path / "raw.gguf", **content))


def test_a_file_that_shrinks_while_it_is_read(small, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(small.read_bytes())
    file = GgufFile(path)
    path.write_bytes(small.read_bytes()[:5000])
    with pytest.raises(InputError, match="became shorter"):
        file.rows("blk.0.ffn_down.weight")

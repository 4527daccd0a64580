"""Streamed safetensors files against the library's own bytes."""

import errno
import json
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save

from ptq.export.shards import Entry, plan_shards, tensor_bytes, tensor_entry, write_checkpoint, write_shard


def tensors():
    g = torch.Generator().manual_seed(0)
    floats = torch.randn(3, 5, generator=g)
    dtypes = "float64 float32 bfloat16 float16 int64 int32 uint32 int16 uint16 int8 uint8".split()
    made = {f"t.{name}": (floats * 9).abs().to(getattr(torch, name)) for name in dtypes}
    return made | {
        "b.bool": floats > 0,
        "f8": floats.to(torch.float8_e4m3fn),
        "f8e5": floats.to(torch.float8_e5m2),
        "z.bf16": floats.bfloat16() * 3,
        "a.bf16": floats.bfloat16() * 2,
        "Z.scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "strided": floats.T,
        "stepped": torch.arange(8)[::2],
        'quote"\\é\n': torch.arange(7),
    }


def entries(named):
    return [tensor_entry(name, t) for name, t in named.items()]


def library_bytes(named, metadata):
    return save({name: t.contiguous() for name, t in named.items()}, metadata=metadata)


def test_file_equals_the_library(tmp_path):
    named = tensors()
    write_shard(tmp_path / "m.safetensors", entries(named))
    assert (tmp_path / "m.safetensors").read_bytes() == library_bytes(named, {"format": "pt"})


@pytest.mark.parametrize("count", range(1, 9))
def test_header_padding_equals_the_library(tmp_path, count):
    named = {"n" * count: torch.arange(3)}
    write_shard(tmp_path / "m", entries(named))
    assert (tmp_path / "m").read_bytes() == library_bytes(named, {"format": "pt"})


def test_header_by_hand(tmp_path):
    write_shard(tmp_path / "m", [Entry("w", "I16", (2,), lambda: b"\x01\x00\x02\x00")], metadata={})
    header = b'{"w":{"dtype":"I16","shape":[2],"data_offsets":[0,4]}}' + b"  "  # 54 characters and 2 spaces
    assert (tmp_path / "m").read_bytes() == b"\x38" + bytes(7) + header + b"\x01\x00\x02\x00"


def test_order_of_entries_and_metadata_does_not_change_the_bytes(tmp_path):
    named = entries(tensors())
    write_shard(tmp_path / "a", named, metadata={"format": "pt", "alpha": "1"})
    write_shard(tmp_path / "b", named[::-1], metadata={"alpha": "1", "format": "pt"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_chunks_equal_one_buffer(tmp_path):
    t = torch.arange(12, dtype=torch.int32)
    data = bytes(tensor_bytes(t))
    chunked = Entry("t", "I32", (12,), lambda: (data[i : i + 5] for i in range(0, len(data), 5)))
    write_shard(tmp_path / "m", [chunked])
    assert (tmp_path / "m").read_bytes() == library_bytes({"t": t}, {"format": "pt"})


@pytest.mark.parametrize("given", [b"123", b"12345", [b"1", b"2"]])
def test_wrong_length_is_refused(tmp_path, given):
    with pytest.raises(ValueError, match=r"w: \d bytes where I16 \[2\] needs 4"):
        write_shard(tmp_path / "m", [Entry("w", "I16", (2,), lambda: given)])


def test_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="w: dtype F4 "):
        write_checkpoint(tmp_path, [Entry("w", "F4", (2,), lambda: b"1")], 100)


@pytest.mark.parametrize("write", [write_shard, lambda path, named: write_checkpoint(path.parent, named, 100)])
def test_two_tensors_of_one_name_are_refused(tmp_path, write):
    entry = Entry("w", "U8", (1,), lambda: b"1")
    with pytest.raises(AssertionError, match="two tensors named w"):
        write(tmp_path / "m", [entry, entry])


def test_one_tensor_in_memory_at_a_time(tmp_path):
    nbytes = 4_000_000
    named = [Entry(f"t{i}", "U8", (nbytes,), lambda: bytes(nbytes)) for i in range(4)]
    tracemalloc.start()
    write_shard(tmp_path / "m", named)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert nbytes <= peak < 1.5 * nbytes


def test_plan():
    sizes = [("a", 4), ("b", 4), ("c", 3), ("d", 20), ("e", 1), ("f", 7), ("g", 1)]
    assert plan_shards(sizes, 8) == [["a", "b"], ["c"], ["d"], ["e", "f"], ["g"]]
    assert plan_shards(sizes, 40) == [["a", "b", "c", "d", "e", "f", "g"]]
    assert plan_shards(sizes, 1) == [["a"], ["b"], ["c"], ["d"], ["e"], ["f"], ["g"]]
    assert plan_shards([], 8) == [[]]
    with pytest.raises(ValueError, match="max_shard_bytes 0"):
        plan_shards(sizes, 0)


def test_small_checkpoint_is_one_file_without_index(tmp_path):
    named = tensors()
    write_checkpoint(tmp_path, entries(named), 10**9, {"format": "pt"})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == library_bytes(named, {"format": "pt"})


def test_shards_and_index(tmp_path):
    named = {"c": torch.zeros(4), "a": torch.ones(4), "b": torch.ones(2).bfloat16()}  # 16, 16 and 4 bytes
    write_checkpoint(tmp_path, entries(named), 20, {"made_by": "ptq"})
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert (tmp_path / first).read_bytes() == library_bytes({"c": named["c"]}, {"made_by": "ptq"})
    assert (tmp_path / second).read_bytes() == library_bytes({n: named[n] for n in "ab"}, {"made_by": "ptq"})
    assert (tmp_path / "model.safetensors.index.json").read_text() == (
        "{\n"
        '  "metadata": {\n'
        '    "total_size": 36\n'
        "  },\n"
        '  "weight_map": {\n'
        f'    "a": "{second}",\n'
        f'    "b": "{second}",\n'
        f'    "c": "{first}"\n'
        "  }\n"
        "}\n"
    )
    assert len(list(tmp_path.iterdir())) == 3


def test_every_tensor_is_where_the_index_says(tmp_path):
    named = tensors()
    write_checkpoint(tmp_path, entries(named), 100, {"format": "pt"})
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map) == set(named) and len(set(weight_map.values())) > 3
    for name, file_name in weight_map.items():
        assert bytes(tensor_bytes(load_file(tmp_path / file_name)[name])) == bytes(tensor_bytes(named[name]))


def test_file_is_on_the_disk_when_the_writer_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda fd: synced.append((tmp_path / "model.safetensors").stat().st_size))
    write_checkpoint(tmp_path, entries(tensors()), 10**9, {"format": "pt"})
    assert synced == [(tmp_path / "model.safetensors").stat().st_size]


@pytest.mark.parametrize("nbytes", [1, 10**6])
def test_a_full_disk_is_an_os_error(tmp_path, nbytes):
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        write_checkpoint(tmp_path, [Entry("w", "U8", (nbytes,), lambda: bytes(nbytes))], 10**9, {"format": "pt"})
    assert caught.value.errno == errno.ENOSPC


def test_an_unwritable_path_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        write_shard(tmp_path, entries(tensors()))
    with pytest.raises(OSError):
        write_shard(tmp_path / "no such folder" / "m", entries(tensors()))

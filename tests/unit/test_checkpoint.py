"""Opening and reading model folders, sound and broken."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny

from calibration.errors import InputError
from ptq import checkpoint
from ptq.checkpoint import open_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("llama"), dtype="bfloat16", shards=3)


@pytest.fixture
def sharded(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "sharded"))


@pytest.fixture
def small(tmp_path):
    """A folder with one file of two tensors."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}, folder / "model.safetensors")
    return folder


def shard_names(folder):
    return sorted(file.name for file in folder.glob("*.safetensors"))


def edit_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def write_shard(file, header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def refuses(folder, *words, **options):
    """The error is one line that holds every word."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# Reading


def expected_tensors(folder):
    return {name: tensor for shard in shard_names(folder) for name, tensor in load_file(folder / shard).items()}


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_read_and_raw_equal_the_library(pristine):
    opened = open_checkpoint(pristine)
    expected = expected_tensors(pristine)
    assert len(opened.shards) >= 3 and set(opened.names()) == set(expected)
    wanted = opened.names()[::-1]
    tensors = opened.read(wanted)
    assert list(tensors) == wanted
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
        assert b"".join(opened.raw(name)) == as_bytes(tensor)
        assert opened.shape(name) == tuple(tensor.shape) and opened.dtype(name) == "BF16"
        assert opened.nbytes(name) == tensor.numel() * 2


def test_names_are_in_file_order(pristine):
    opened = open_checkpoint(pristine)
    places = [(opened.tensors[name].file.name, opened.tensors[name].start) for name in opened.names()]
    assert places == sorted(places)


def test_names_are_in_file_order_whatever_the_header_says(small):
    write_shard(small / "model.safetensors", {"a": entry(8, 16), "b": entry(0, 8)}, b"1" * 16)
    assert open_checkpoint(small).names() == ["b", "a"]


def test_raw_comes_in_chunks(small, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 10)
    chunks = list(open_checkpoint(small).raw("a"))
    assert [len(chunk) for chunk in chunks] == [10, 10, 4]
    assert b"".join(chunks) == as_bytes(torch.arange(6.0))


def test_raw_sees_a_file_that_shrank(small):
    opened = open_checkpoint(small)
    file = small / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(InputError, match="became shorter while 'b'"):
        list(opened.raw("b"))


def test_odd_tensors(small):
    # Empty, scalar and 8-bit tensors, as buffers of real checkpoints are.
    stored = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.5), "mask": torch.ones(3, 3, dtype=torch.bool)}
    save_file(stored, small / "model.safetensors")
    opened = open_checkpoint(small)
    for name, tensor in opened.read(opened.names()).items():
        assert torch.equal(tensor, stored[name]) and opened.shape(name) == tuple(tensor.shape)
    assert list(opened.raw("empty")) == [] and opened.nbytes("empty") == 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_reading_keeps_no_file_mapped(sharded):
    opened = open_checkpoint(sharded)
    tensors = opened.read(opened.names())
    list(opened.raw(opened.names()[0]))
    opened.fingerprint()
    assert str(sharded) not in Path("/proc/self/maps").read_text()
    assert len(tensors) == len(opened.names())


def test_unknown_tensor(small):
    opened = open_checkpoint(small)
    for ask in (opened.shape, opened.nbytes, lambda name: opened.read([name]), lambda name: list(opened.raw(name))):
        with pytest.raises(InputError, match="no tensor 'model.norm.weight'"):
            ask("model.norm.weight")


def test_shards_may_be_links(pristine, tmp_path):
    for file in pristine.iterdir():
        (tmp_path / file.name).symlink_to(file)
    linked = open_checkpoint(tmp_path)
    assert linked.names() == open_checkpoint(pristine).names()
    assert linked.fingerprint() == open_checkpoint(pristine).fingerprint()


def test_single_file_wins_over_index(sharded):
    save_file({"only": torch.ones(2)}, sharded / "model.safetensors")
    assert open_checkpoint(sharded).names() == ["only"]


# Fingerprint


def test_fingerprint_ignores_place_and_date(pristine, sharded):
    (sharded / INDEX).touch()
    assert open_checkpoint(sharded).fingerprint() == open_checkpoint(pristine).fingerprint()


def overwrite(opened, name, offset):
    """Change one byte of a tensor."""
    tensor = opened.tensors[name]
    with tensor.file.open("r+b") as handle:
        handle.seek(tensor.start + offset)
        old = handle.read(1)
        handle.seek(tensor.start + offset)
        handle.write(bytes([old[0] ^ 1]))


def test_fingerprint_sees_every_tensor_and_the_config(sharded):
    opened = open_checkpoint(sharded)
    seen = {opened.fingerprint()}
    for name in opened.names():
        overwrite(opened, name, 0)
        seen.add(opened.fingerprint())
        overwrite(opened, name, opened.nbytes(name) - 1)
        seen.add(opened.fingerprint())
    edit_json(sharded / "config.json", rms_norm_eps=1e-3)
    seen.add(opened.fingerprint())
    assert len(seen) == 2 * len(opened.names()) + 2


def test_fingerprint_sees_a_renamed_tensor(small):
    before = open_checkpoint(small).fingerprint()
    save_file({"a": torch.arange(6.0).reshape(2, 3), "c": torch.ones(4)}, small / "model.safetensors")
    assert open_checkpoint(small).fingerprint() != before


# The folder and its config


def test_missing_folder(tmp_path):
    refuses(tmp_path / "nope", "nope: there is no such folder")


def test_file_instead_of_folder(small):
    refuses(small / "model.safetensors", "model.safetensors: is a file; give the folder")


def test_missing_config(small):
    (small / "config.json").unlink()
    refuses(small, "config.json: is missing")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe{", b"[" * 100_000])
def test_config_that_is_not_json(small, text):
    (small / "config.json").write_bytes(text)
    refuses(small, "config.json: cannot be read as JSON")


def test_config_that_is_no_object(small):
    (small / "config.json").write_text("[1]")
    refuses(small, "config.json: must hold a JSON object, not a list")


def test_quantization_config(small):
    assert open_checkpoint(small).quantization_config is None
    edit_json(small / "config.json", quantization_config={"bits": 4})
    assert open_checkpoint(small).quantization_config == {"bits": 4}
    edit_json(small / "config.json", quantization_config="gptq")
    refuses(small, "config.json: quantization_config must be an object")


def test_remote_code_needs_the_flag(small):
    edit_json(small / "config.json", model_type="mystery", auto_map={"AutoModelForCausalLM": "modeling.Mystery"})
    refuses(small, "config.json", "'mystery'", "--trust-remote-code")
    assert open_checkpoint(small, trust_remote_code=True).config["model_type"] == "mystery"
    edit_json(small / "config.json", model_type="llama")
    assert open_checkpoint(small).names() == ["a", "b"]


# Which files are the weights


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_weights_are_refused(small, name):
    (small / "model.safetensors").rename(small / name)
    refuses(small, str(small), "pickle", "machine you trust", "save_pretrained(..., safe_serialization=True)")


def test_no_weights(small):
    (small / "model.safetensors").unlink()
    refuses(small, "has no model.safetensors and no model.safetensors.index.json")


def test_shards_without_index(sharded):
    (sharded / INDEX).unlink()
    refuses(sharded, "neither model.safetensors nor model.safetensors.index.json")


def test_index_that_is_not_json(sharded):
    (sharded / INDEX).write_text("{'weight_map'")
    refuses(sharded, f"{INDEX}: cannot be read as JSON")


@pytest.mark.parametrize("weight_map", [None, [], {}, "model.safetensors"])
def test_index_without_a_map(sharded, weight_map):
    edit_json(sharded / INDEX, weight_map=weight_map)
    refuses(sharded, f"{INDEX}: weight_map must be an object")


@pytest.mark.parametrize(
    "form", ["{parent}/out.safetensors", "../out.safetensors", "sub/x.safetensors", "sub\\x.safetensors"]
)
def test_index_may_not_leave_the_folder(small, form, tmp_path):
    (small / "model.safetensors").rename(tmp_path / "out.safetensors")
    (small / "sub").mkdir()
    shutil.copy(tmp_path / "out.safetensors", small / "sub" / "x.safetensors")
    shutil.copy(tmp_path / "out.safetensors", small / "sub\\x.safetensors")
    file = form.format(parent=tmp_path)
    (small / INDEX).write_text(json.dumps({"weight_map": {"a": file, "b": file}}))
    refuses(small, f"{INDEX}: 'a' must map to a plain .safetensors file name", repr(file))


@pytest.mark.parametrize("file", [7, "pytorch_model.bin"])
def test_index_must_name_safetensors(sharded, file):
    edit_json(sharded / INDEX, weight_map={"a": file})
    refuses(sharded, f"{INDEX}: 'a' must map to a plain .safetensors file name", repr(file))


def test_index_names_a_missing_shard(sharded):
    gone = shard_names(sharded)[1]
    (sharded / gone).unlink()
    refuses(sharded, INDEX, f"names {gone!r}, which is missing")


def test_index_names_an_absent_tensor(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    first = shard_names(sharded)[0]
    edit_json(sharded / INDEX, weight_map=weight_map | {"extra.weight": first})
    refuses(sharded, INDEX, f"'extra.weight' is not in {first!r}")


def test_index_puts_a_tensor_in_the_wrong_shard(small):
    (small / "model.safetensors").rename(small / "x.safetensors")
    save_file({"c": torch.ones(4)}, small / "y.safetensors")
    weight_map = {"a": "y.safetensors", "b": "x.safetensors", "c": "y.safetensors"}
    (small / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refuses(small, INDEX, "'a' is not in 'y.safetensors'")


def test_tensor_in_two_shards(small):
    (small / "model.safetensors").rename(small / "x.safetensors")
    save_file({"b": torch.ones(4)}, small / "y.safetensors")
    (small / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
    refuses(small, "y.safetensors: tensor 'b' is already in x.safetensors")


# The layout of one shard


def test_truncated_shard(sharded):
    file = sharded / shard_names(sharded)[-1]
    file.write_bytes(file.read_bytes()[:-1])
    refuses(sharded, f"{file}: not a whole safetensors file", "cut short or damaged")


BROKEN = {
    "zero bytes": b"",
    "short prefix": b"\0\0\0",
    "header beyond the file": (1000).to_bytes(8, "little") + b"{}",
    "huge header": (1 << 62).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_file_that_is_no_shard(small, content):
    (small / "model.safetensors").write_bytes(content)
    refuses(small, "model.safetensors: not a whole safetensors file", f"; {len(content)} bytes)")


HEADERS = {
    "not JSON": (b"hello", b""),
    "a list": ([], b""),
    "data shorter than offsets": ({"a": entry(0, 8)}, b"1234"),
    "data after the last tensor": ({"a": entry(0, 8)}, b"1" * 12),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, b"1" * 12),
    "gap": ({"a": entry(0, 8), "b": entry(12, 20)}, b"1" * 20),
    "same bytes twice": ({"a": entry(0, 8), "b": entry(0, 8)}, b"1" * 8),
    "backwards": ({"a": entry(8, 0)}, b"1" * 8),
    "negative": ({"a": entry(-8, 0)}, b"1" * 8),
    "shape and bytes disagree": ({"a": entry(0, 8, shape=(3,))}, b"1" * 8),
    "unknown dtype": ({"a": entry(0, 8, dtype="Q9")}, b"1" * 8),
    "overflow": ({"a": entry(0, 8, shape=(2**40, 2**40))}, b"1" * 8),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "name with a line break": ({"a\nb": entry(8, 0)}, b"1" * 8),
}


@pytest.mark.parametrize(("header", "data"), HEADERS.values(), ids=HEADERS)
def test_broken_header(small, header, data):
    write_shard(small / "model.safetensors", header, data)
    refuses(small, "model.safetensors: not a whole safetensors file")


def test_name_twice_in_one_header(small):
    one = b'"a":' + json.dumps(entry(0, 8)).encode()
    write_shard(small / "model.safetensors", b"{" + one + b"," + one + b"}", b"1" * 8)
    refuses(small, "model.safetensors: its header names the same key twice")


def test_no_tensors(small):
    write_shard(small / "model.safetensors", {"__metadata__": {"format": "pt"}})
    refuses(small, "its safetensors files hold no tensors")


# The hub


def test_hub_that_cannot_be_reached(monkeypatch):
    def no_network(hub_id, **options):
        raise ConnectionError("Name or service not known\nsecond line")

    monkeypatch.setattr(checkpoint, "model_info", no_network)
    refuses("nobody/no-such-model", "'nobody/no-such-model'", "hub did not give it: Name or service not known")


@pytest.mark.parametrize("trust", [False, True])
def test_hub_download_asks_for_no_code_or_pickles(small, monkeypatch, trust):
    asked = {}

    def download(hub_id, **options):
        asked.update(options, hub_id=hub_id)
        return str(small)

    monkeypatch.setattr(checkpoint, "model_info", lambda hub_id, timeout: None)
    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert open_checkpoint("some/model", trust_remote_code=trust).folder == small
    assert asked["hub_id"] == "some/model" and asked["local_files_only"] is False
    assert {"*.safetensors", "*.json", "*.txt", "tokenizer*"} <= set(asked["allow_patterns"])
    assert not {"*", "*.bin", "*.pt"} & set(asked["allow_patterns"])
    assert ("*.py" in asked["allow_patterns"]) == trust


def test_hub_copy_is_used_offline(small, monkeypatch):
    def no_network(hub_id, **options):
        raise ConnectionError("offline")

    def cached(hub_id, *, local_files_only, **options):
        assert local_files_only
        return str(small)

    monkeypatch.setattr(checkpoint, "model_info", no_network)
    monkeypatch.setattr(checkpoint, "snapshot_download", cached)
    assert open_checkpoint("some/model").folder == small

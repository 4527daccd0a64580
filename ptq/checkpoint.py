"""Reading a Hugging Face model folder: checked once when opened, then streamed tensor by tensor.

Only safetensors files are read. Pickle files (.bin, .pt) can run code and are refused. The layout rules of a shard
(offsets in range, in order, without overlap or gap, sizes that match shapes) are those of the safetensors library,
which opens every shard once here; the index, the names and the config are checked by this file. NaN and infinity are
not looked for: that needs every byte and belongs to the walker.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import model_info, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig

from calibration.errors import InputError
from ptq.export.shards import DTYPES

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "tokenizer*"]
HUB_SECONDS = 5
CHUNK_BYTES = 1 << 24
SAMPLE_BYTES = 1 << 12


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `start` and `end` are byte positions in `file`, `dtype` is safetensors' word for it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """An opened and checked model folder.

    Attributes:
        folder: The folder itself.
        config: The parsed config.json.
        shards: The safetensors files, in the order of their names.
        tensors: Every stored tensor by name, in file order.
    """

    folder: Path
    config: dict
    shards: tuple[Path, ...]
    tensors: dict[str, StoredTensor]

    @property
    def quantization_config(self) -> dict | None:
        """What config.json says about an earlier quantization; None for a folder that was never quantized."""
        return self.config.get("quantization_config")

    def model_config(self, *, trust_remote_code: bool = False):
        """The transformers config; raises whatever a wrong value breaks in there."""
        return AutoConfig.from_pretrained(self.folder, trust_remote_code=trust_remote_code)

    def names(self) -> list[str]:
        """Tensor names in file order."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._find(name).shape

    def dtype(self, name: str) -> str:
        """Safetensors' word for a tensor's dtype, such as "F32" or "BF16"."""
        return self._find(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes a tensor takes in its file."""
        return self._find(name).end - self._find(name).start

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Copies of tensors on the CPU, in the order asked for.

        Read, not mapped: a mapped file's pages would count as ours beside the copy.
        """
        return {name: self._read(self._find(name), name) for name in names}

    def _read(self, stored, name):
        content = torch.empty(stored.end - stored.start, dtype=torch.uint8)
        with stored.file.open("rb") as handle:
            handle.seek(stored.start)
            if handle.readinto(content.numpy()) != len(content):
                raise InputError(f"{stored.file}: became shorter while {name!r} was read")
        return content.view(DTYPES[stored.dtype]).view(stored.shape)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor's numbers in order, flat, in copies of at most CHUNK_BYTES."""
        dtype = DTYPES[self._find(name).dtype]
        return (torch.frombuffer(bytearray(chunk), dtype=dtype) for chunk in self.raw(name))

    def raw(self, name: str) -> Iterator[bytes]:
        """Yield a tensor's exact bytes in chunks of at most CHUNK_BYTES."""
        tensor = self._find(name)
        with tensor.file.open("rb") as handle:
            handle.seek(tensor.start)
            for position in range(tensor.start, tensor.end, CHUNK_BYTES):
                wanted = min(CHUNK_BYTES, tensor.end - position)
                chunk = handle.read(wanted)
                if len(chunk) != wanted:
                    raise InputError(f"{tensor.file}: became shorter while {name!r} was read")
                yield chunk

    def fingerprint(self) -> str:
        """Hex sha256 that changes with the model and not with its place or date.

        It covers config.json, every shard's name, size and header, and both ends of every tensor, so one
        replaced linear is seen without reading the whole model. An edit only in a big tensor's middle is not seen.
        """
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for shard in self.shards:
            header = _header_bytes(shard)
            digest.update(json.dumps([shard.name, shard.stat().st_size, len(header)]).encode() + header)
            for sample in _tensor_ends(shard, [tensor for tensor in self.tensors.values() if tensor.file == shard]):
                digest.update(sample)
        return digest.hexdigest()

    def _find(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise InputError(f"{self.folder}: the checkpoint has no tensor {name!r}")
        return self.tensors[name]


def open_checkpoint(path_or_hub_id: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Open a local model folder, or a Hugging Face hub id, and check everything that can be checked cheaply.

    Args:
        path_or_hub_id: A folder that exists, else an id like "bigcode/starcoderbase".
        trust_remote_code: Whether a model that transformers does not know may bring its own Python code.

    Raises:
        InputError: One line that names the file and the rule it breaks.
    """
    folder = _locate(path_or_hub_id, trust_remote_code)
    config = _read_config(folder / "config.json", trust_remote_code)
    weight_map, shards = _find_shards(folder)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in _read_layout(shard).items():
            if name in tensors:
                raise InputError(f"{shard}: tensor {name!r} is already in {tensors[name].file.name}")
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise InputError(f"{folder / INDEX}: tensor {name!r} is not in {file!r}, where the index puts it")
    if not tensors:
        raise InputError(f"{folder}: its safetensors files hold no tensors")
    return Checkpoint(folder, config, shards, tensors)


def _locate(path_or_hub_id: str | Path, trust_remote_code: bool) -> Path:
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{folder}: is a file; give the folder that holds config.json")
    try:
        validate_repo_id(str(path_or_hub_id))
    except HFValidationError as error:
        raise InputError(f"{folder}: there is no such folder") from error
    return _download(str(path_or_hub_id), trust_remote_code)


def _download(hub_id: str, trust_remote_code: bool) -> Path:
    patterns = HUB_PATTERNS + (["*.py"] if trust_remote_code else [])
    unreachable = _ask_hub(hub_id)
    try:
        # Subfolders and Mistral's consolidated files hold the same weights a second time.
        return Path(
            snapshot_download(
                hub_id,
                allow_patterns=patterns,
                ignore_patterns=["*/*", "consolidated*"],
                local_files_only=unreachable is not None,
            )
        )
    except Exception as error:  # the hub lets its HTTP library's errors through, and has changed library
        cause = _first_line(unreachable or error)
        raise InputError(f"{hub_id!r} is no folder here and the Hugging Face hub did not give it: {cause}") from error


def _ask_hub(hub_id: str) -> Exception | None:
    """What keeps the hub from answering; snapshot_download's own first request waits without end."""
    try:
        model_info(hub_id, timeout=HUB_SECONDS)
    except Exception as error:
        return error
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_config(file: Path, trust_remote_code: bool) -> dict:
    config = _read_json_object(file)
    if not isinstance(config.get("quantization_config"), dict | None):
        raise InputError(f"{file}: quantization_config must be an object")
    model_type = config.get("model_type")
    if config.get("auto_map") and model_type not in CONFIG_MAPPING.keys() and not trust_remote_code:
        raise InputError(
            f"{file}: model_type {model_type!r} is unknown to transformers and brings its own Python code"
            " (auto_map); read that code, then pass --trust-remote-code to run it"
        )
    return config


def _read_json_object(file: Path) -> dict:
    if not file.is_file():
        raise InputError(f"{file}: is missing")
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: must hold a JSON object, not a {type(value).__name__}")
    return value


def _find_shards(folder: Path) -> tuple[dict[str, str], tuple[Path, ...]]:
    """The index's weight_map (empty without one) and the shards; a single file wins, as in transformers."""
    if (folder / SINGLE).is_file():
        return {}, (folder / SINGLE,)
    if (folder / INDEX).is_file():
        weight_map = _read_weight_map(folder / INDEX)
        shards = tuple(folder / file for file in sorted(set(weight_map.values())))
        for shard in shards:
            if not shard.is_file():
                raise InputError(f"{folder / INDEX}: names {shard.name!r}, which is missing")
        return weight_map, shards
    if any(folder.glob("*.safetensors")):
        raise InputError(f"{folder}: has safetensors files, but neither {SINGLE} nor {INDEX} to say which to read")
    if any(file.suffix in PICKLE_SUFFIXES for file in folder.iterdir()):
        raise InputError(
            f"{folder}: has only pickle weights, which can run code and are never read; on a machine you trust convert"
            " them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    raise InputError(f"{folder}: has no {SINGLE} and no {INDEX}")


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map must be an object of tensor names and file names")
    for name, file in weight_map.items():
        # A name with a separator of either kind of system could leave the folder.
        if not isinstance(file, str) or not file.endswith(".safetensors") or set(file) & set("/\\:\0"):
            raise InputError(f"{index}: {name!r} must map to a plain .safetensors file name, not {file!r}")
    return weight_map


def _read_layout(shard: Path) -> dict[str, StoredTensor]:
    """Tensors of one shard in the order of their bytes, after safetensors has checked the file's layout."""
    try:
        with safe_open(shard, framework="pt", device="cpu"):
            pass
    except (SafetensorError, OSError) as error:
        size = shard.stat().st_size
        raise InputError(
            f"{shard}: not a whole safetensors file ({_first_line(error)}; {size} bytes):"
            " cut short or damaged, fetch it again"
        ) from error
    header = _header_bytes(shard)
    entries = json.loads(header, object_pairs_hook=lambda pairs: _without_repeats(pairs, shard))
    entries.pop("__metadata__", None)
    data = 8 + len(header)
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise InputError(f"{shard}: {name!r} is stored as {entry['dtype']}, which is not read here")
    tensors = {
        name: StoredTensor(shard, entry["dtype"], tuple(entry["shape"]), data + begin, data + end)
        for name, entry in entries.items()
        for begin, end in [entry["data_offsets"]]
    }
    return dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))


def _header_bytes(shard: Path) -> bytes:
    with shard.open("rb") as handle:
        return handle.read(int.from_bytes(handle.read(8), "little"))


def _tensor_ends(shard: Path, tensors: list[StoredTensor]) -> Iterator[bytes]:
    with shard.open("rb") as handle:
        for tensor in tensors:
            for position in (tensor.start, max(tensor.start, tensor.end - SAMPLE_BYTES)):
                handle.seek(position)
                yield handle.read(min(SAMPLE_BYTES, tensor.end - position))


def _without_repeats(pairs: list[tuple[str, object]], shard: Path) -> dict:
    """A JSON object; safetensors keeps the last of two equal names without a word."""
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise InputError(f"{shard}: its header names the same key twice")
    return unique

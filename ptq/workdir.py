"""The work folder of a run: what is finished survives a kill, and only the same run may go on with it.

`<out>.ptq-work/` lies beside the output. It holds run.json (what the run is), one safetensors file a finished block,
one with what tuning made of it, others with what was settled before the first, spilled activations, and the artefact
while it is written. Every file is written aside, synced and renamed, so a name that exists is whole. The lock is the
operating system's: it goes with the process that holds it.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from calibration.errors import InputError
from ptq.export.shards import sync_folder, tensor_bytes, tensor_entry, write_shard

SUFFIX = ".ptq-work"


class WorkFolder:
    """Locks and opens the work folder of an output folder.

    An earlier run counts from the first thing it finished; before that there is nothing to go on with.

    Args:
        out: The output folder-to-be.
        identity: JSON-able facts that decide the result; a resumed run must have the same.
        resume: Go on with what an earlier run left; damaged blocks of it are dropped, to be done again.

    Attributes:
        resumed: Whether an earlier run's blocks are there.

    Raises:
        InputError: Another process holds it, it belongs to another run, or it exists and `resume` is off.
    """

    def __init__(self, out: Path, identity: dict, *, resume: bool):
        self.out, self.resumed = Path(out), False
        self.folder = work_folder(self.out)
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = self._take_lock()
        except OSError:
            self._remove_made()
            raise
        try:
            self._claim(json.loads(json.dumps(identity)), resume)
        except BaseException:
            self.close()
            raise

    def _take_lock(self):
        path = self.folder / "lock"
        lock = open(path, "a+")  # noqa: SIM115 - held as long as the run
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        except (BlockingIOError, FileNotFoundError):  # the second: its holder is just removing the folder
            pass
        lock.close()
        raise InputError(f"{self.folder}: another process is working on this output")

    def _claim(self, identity, resume):
        record = self.folder / "run.json"
        if not record.exists() or not self._finished():
            self._empty()
            write_atomically(record, json.dumps(identity, indent=2).encode())
            return
        if not resume:
            raise InputError(
                f"{self.folder}: an interrupted run left its work here; go on with --resume, or delete the folder"
            )
        try:
            before = json.loads(record.read_bytes())
        except ValueError:
            raise InputError(f"{record}: damaged; delete {self.folder} and start again") from None
        changed = differences(before, identity)
        if changed:
            raise InputError(f"{self.folder}: cannot resume, the run is another one: {'; '.join(changed)}")
        for path in (*self._blocks(), *self.folder.glob("tuned-*.safetensors")):
            if not _is_whole(path):
                path.unlink()
                self._tuned.unlink(missing_ok=True)  # tuning begins when all blocks are there
        for path in self._finished():
            if not _is_whole(path):
                path.unlink()
        self.resumed = bool(self._finished())

    def _remove_made(self):
        for path in self._made:
            with suppress(OSError):  # what holds something stays
                path.rmdir()

    def _blocks(self):
        return sorted(self.folder.glob("block-*.safetensors"))

    def _finished(self):
        return sorted(self.folder.glob("*.safetensors"))

    def _empty(self):
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    @property
    def artefact(self) -> Path:
        """Where the artefact is written before it gets its name; emptied when asked for."""
        folder = self.folder / "artefact"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def has_block(self, i: int) -> bool:
        """Whether block i is finished."""
        return self._block(i).exists()

    def save_block(self, i: int, tensors: dict[str, torch.Tensor], report: dict):
        """Keeps a finished block: its packed tensors by full name, and its part of the report."""
        self._save(self._block(i), tensors, report)

    @property
    def has_tuned(self) -> bool:
        """Whether tuning is finished."""
        return self._tuned.exists()

    def save_tuned(self, report: dict):
        """Ends tuning: from now on the tuned blocks that are there stand in for the walk's."""
        self._save(self._tuned, {}, report)

    def save_tuned_block(self, i: int, tensors: dict[str, torch.Tensor], report: dict):
        """Keeps what tuning has made of a block so far.

        Args:
            i: The block.
            tensors: By full name, of the same shapes and dtypes as in the block.
            report: Added, linear by linear, to that of the block.
        """
        self._save(self._tuned_block(i), tensors, report)

    def has_tuned_block(self, i: int) -> bool:
        """Whether tuning has made something of block i."""
        return self._tuned_block(i).exists()

    def drop_tuned(self):
        """Removes what a tuning that did not end has left."""
        self.drop_parts("tuned*")

    def has_part(self, name: str) -> bool:
        """Whether something that is settled before the first block is."""
        return self._part(name).exists()

    def save_part(self, name: str, tensors: dict[str, torch.Tensor], report: dict):
        """Keeps it: tensors and a report."""
        self._save(self._part(name), tensors, report)

    def part_report(self, name: str) -> dict:
        """Its report."""
        return _report(self._part(name))

    def part_tensor(self, name: str, tensor: str) -> torch.Tensor:
        """One of its tensors."""
        with _open_block(self._part(name)) as file:
            return file.get_tensor(tensor).clone()

    def drop_parts(self, pattern: str, *, but: Collection[str] = ()):
        """Removes parts whose names match a pattern, but for some."""
        for path in self.folder.glob(f"{pattern}.safetensors"):
            if path.stem not in but:
                path.unlink()

    def has_fisher(self, i: int) -> bool:
        """Whether block i's H_O are there."""
        return self.has_part(_fisher(i))

    def save_fisher(self, i: int, stages: list[list[torch.Tensor]], weights: list[torch.Tensor]):
        """Keeps block i's H_O, for each stage one of each run of outputs, and each stage's weights of tokens (T,)."""
        parts = {f"{s}.{run}": HO for s, runs in enumerate(stages) for run, HO in enumerate(runs)}
        parts |= {f"{s}.weight": weight for s, weight in enumerate(weights)}
        self.save_part(_fisher(i), parts, {"runs": [len(runs) for runs in stages]})

    def fisher(self, i: int, stage: int) -> list[torch.Tensor]:
        """H_O of a stage's runs of outputs in block i."""
        runs = self.part_report(_fisher(i))["runs"][stage]
        return [self.part_tensor(_fisher(i), f"{stage}.{run}") for run in range(runs)]

    def token_weights(self, i: int, stage: int) -> torch.Tensor:
        """(T,) how much each of the first tokens counts in the Hessian of a stage of block i."""
        return self.part_tensor(_fisher(i), f"{stage}.weight")

    def tuned_report(self) -> dict | None:
        """The report of tuning; None before it is finished."""
        return _report(self._tuned) if self.has_tuned else None

    def load_block(self, i: int) -> dict[str, torch.Tensor]:
        """The packed tensors of a finished block, in the order in which they were saved."""
        return {name: self.read(i, name) for name, _, _ in self.layout(i)}

    def read(self, i: int, name: str) -> torch.Tensor:
        """One packed tensor of a finished block."""
        for path in (self._tuned_block(i), self._block(i)) if self._is_tuned(i) else (self._block(i),):
            with _open_block(path) as file:
                if name in file.keys():  # noqa: SIM118 - it is no dict
                    return file.get_tensor(name).clone()
        raise KeyError(name)

    def layout(self, i: int) -> list[tuple[str, str, tuple]]:
        """(name, dtype, shape) of the packed tensors of a finished block."""
        with _open_block(self._block(i)) as file:
            slices = [(name, file.get_slice(name)) for name in json.loads(file.metadata()["order"])]
            return [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices]

    def report(self, i: int) -> dict:
        """A finished block's part of the report."""
        tuned = _report(self._tuned_block(i)) if self._is_tuned(i) else {}
        return {name: entry | tuned.get(name, {}) for name, entry in _report(self._block(i)).items()}

    def _save(self, path, tensors, report):
        aside = path.with_suffix(".partial")
        metadata = {"report": json.dumps(report), "order": json.dumps(list(tensors))}
        metadata["sha256"] = _content_hash(metadata, tensors.values())
        write_shard(aside, [tensor_entry(name, tensor) for name, tensor in tensors.items()], metadata=metadata)
        os.replace(aside, path)
        sync_folder(self.folder)

    @property
    def _tuned(self):
        return self._part("tuned")

    def _tuned_block(self, i):
        return self._part(f"tuned-{i:05d}")

    def _is_tuned(self, i):
        return self.has_tuned and self._tuned_block(i).exists()

    def _part(self, name):
        return self.folder / f"{name}.safetensors"

    def _block(self, i):
        return self.folder / f"block-{i:05d}.safetensors"

    def publish(self, artefact: Path):
        """Gives the finished artefact its name and removes the work folder."""
        for path in artefact.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        sync_folder(artefact)
        os.rename(artefact, self.out)
        sync_folder(self.out.parent)
        self.discard()

    def discard(self):
        """Removes the work folder, and folders above it that were made for it and are empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._remove_made()
        self._lock.close()

    def close(self):
        """Lets go of the lock; the folder stays for --resume if anything in it is finished."""
        if not self._lock.closed and not self._finished():
            self.discard()
        self._lock.close()

    @property
    def remains(self) -> str:
        """What a failed run leaves, in words to add to its message; empty if nothing."""
        count = len(self._blocks())
        return f"; {count} finished blocks stay in {self.folder}, --resume goes on with them" if count else ""


class Scratch:
    """What a rank has that keeps nothing: a folder for spilled activations, beside where the first rank works.

    Args:
        out: The output folder-to-be.
        rank: Whose.
    """

    def __init__(self, out: Path, rank: int):
        self.folder = work_folder(Path(out)) / f"rank-{rank}"

    def close(self):
        """Removes it, and on a machine where the first rank does not work, what it lies in."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()


def _fisher(i):
    return f"fisher-{i:05d}"


def work_folder(out: Path) -> Path:
    """Where the work for an output folder lies."""
    return out.with_name(out.name + SUFFIX)


def differences(before: dict, after: dict, prefix: str = "") -> list[str]:
    """What changed between two records, down to the innermost fields."""
    changed = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            changed.append(f"{prefix}{key} {old!r} -> {new!r}")
    return changed


def _open_block(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise OSError(None, f"damaged since it was written ({error})", str(path)) from None


def _report(path: Path) -> dict:
    with _open_block(path) as file:
        return json.loads(file.metadata()["report"])


def _is_whole(path: Path) -> bool:
    try:
        with _open_block(path) as file:
            metadata = file.metadata()
            tensors = (file.get_tensor(name) for name in json.loads(metadata["order"]))
            return metadata["sha256"] == _content_hash(metadata, tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return False


def _content_hash(metadata: dict, tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256((metadata["report"] + metadata["order"]).encode())
    for tensor in tensors:
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes):
    """Writes aside, syncs, renames."""
    aside = path.with_name(path.name + ".partial")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)

"""The work folder of a run: what is finished survives a kill, and only the same run may go on with it.

`<out>.ptq-work/` lies beside the output. It holds run.json (what the run is), one safetensors file a finished block,
spilled activations, and the artefact while it is written. Every file is written aside, synced and renamed, so a name
that exists is whole. The lock is the operating system's: it goes with the process that holds it.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from calibration.errors import InputError
from ptq.export.shards import tensor_entry, write_shard

SUFFIX = ".ptq-work"


class WorkFolder:
    """Locks and opens the work folder of an output folder.

    Args:
        out: The output folder-to-be.
        identity: JSON-able facts that decide the result; a resumed run must have the same.
        resume: Go on with what an earlier run left.

    Raises:
        InputError: Another process holds it, it belongs to another run, or it exists and `resume` is off.
    """

    def __init__(self, out: Path, identity: dict, *, resume: bool):
        self.out = Path(out)
        self.folder = self.out.with_name(self.out.name + SUFFIX)
        identity = json.loads(json.dumps(identity))
        self.resumed = self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            self._claim(identity, resume)
        except BaseException:
            self.close()
            raise

    def _take_lock(self):
        lock = open(self.folder / "lock", "a+")  # noqa: SIM115 - held as long as the run
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise InputError(f"{self.folder}: another process is working on this output") from None
        return lock

    def _claim(self, identity, resume):
        record = self.folder / "run.json"
        if not record.exists():  # new, or killed before anything was done
            self.resumed = False
            write_atomically(record, json.dumps(identity, indent=2).encode())
            return
        if not resume:
            raise InputError(
                f"{self.folder}: an interrupted run left its work here; go on with --resume, or delete the folder"
            )
        before = json.loads(record.read_bytes())
        changed = [
            f"{key} {before.get(key)!r} -> {identity.get(key)!r}"
            for key in sorted(before.keys() | identity.keys())
            if before.get(key) != identity.get(key)
        ]
        if changed:
            raise InputError(f"{self.folder}: cannot resume, the run is another one: {'; '.join(changed)}")

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
        aside = self._block(i).with_suffix(".partial")
        entries = [tensor_entry(name, tensor) for name, tensor in tensors.items()]
        write_shard(aside, entries, metadata={"report": json.dumps(report), "order": json.dumps(list(tensors))})
        os.replace(aside, self._block(i))
        sync_folder(self.folder)

    def load_block(self, i: int) -> dict[str, torch.Tensor]:
        """The packed tensors of a finished block, in the order in which they were saved."""
        with self._open_block(i) as file:
            return {name: file.get_tensor(name).clone() for name in json.loads(file.metadata()["order"])}

    def read(self, i: int, name: str) -> torch.Tensor:
        """One packed tensor of a finished block."""
        with self._open_block(i) as file:
            return file.get_tensor(name).clone()

    def layout(self, i: int) -> list[tuple[str, str, tuple]]:
        """(name, dtype, shape) of the packed tensors of a finished block."""
        with self._open_block(i) as file:
            slices = [(name, file.get_slice(name)) for name in json.loads(file.metadata()["order"])]
            return [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices]

    def report(self, i: int) -> dict:
        """A finished block's part of the report."""
        with self._open_block(i) as file:
            return json.loads(file.metadata()["report"])

    def _block(self, i):
        return self.folder / f"block-{i:05d}.safetensors"

    def _open_block(self, i):
        try:
            return safe_open(self._block(i), framework="pt")
        except SafetensorError as error:
            raise InputError(f"{self._block(i)}: damaged ({error}); delete it and --resume") from None

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
        """Removes the work folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self):
        """Lets go of the lock; the folder stays for --resume, unless nothing was done in it."""
        if not self._lock.closed:
            if self.folder.exists() and not any(self.folder.glob("block-*.safetensors")) and not self.resumed:
                shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()


def write_atomically(path: Path, data: bytes):
    """Writes aside, syncs, renames."""
    aside = path.with_name(path.name + ".partial")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path):
    """Makes renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


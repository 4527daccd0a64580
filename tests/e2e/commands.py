"""The command lines as a user runs them: in this process where that is enough, else in one of their own."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[2]
COMPARED = ("*.safetensors", "*.index.json", "config.json", "quantize_config.json", "tokenizer.json")


def token_file(path: Path, rows: int, seqlen: int, *, vocab: int = 300, seed: int = 0) -> Path:
    """Random token rows as a .npy file."""
    np.save(path, np.random.default_rng(seed).integers(0, vocab, (rows, seqlen)))
    return path


def command(module: str, *arguments) -> list[str]:
    """`python -m ptq.<module> ...` for subprocess."""
    return [sys.executable, "-m", f"ptq.{module}", *map(str, arguments)]


def environment(**extra) -> dict:
    """One thread, no hub, this checkout first."""
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return os.environ | offline | extra


def run(module: str, *arguments, **options) -> subprocess.CompletedProcess:
    """Runs a command line in a process of its own, to its end."""
    return subprocess.run(
        command(module, *arguments), capture_output=True, text=True, env=environment(), **{"timeout": 240} | options
    )


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of the files that must not depend on when and how often the run was interrupted."""
    files = sorted(path for pattern in COMPARED for path in Path(folder).glob(pattern))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_report(folder: Path) -> dict:
    """The run's report."""
    return json.loads((Path(folder) / "ptq_report.json").read_text())

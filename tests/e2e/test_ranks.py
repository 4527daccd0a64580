"""Several processes under torchrun: the same files as from one, and one error when a rank is killed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import environment, hashes, token_file
from tiny_models import make_tiny

from ptq import QuantSpec, quantize, quantize_model

BLOCKS = 8
SECONDS = 30  # within which all have to end


def torchrun(*arguments) -> subprocess.Popen:
    """Two ranks of a module or a script."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    return subprocess.Popen([*launch, *map(str, arguments)], **options)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def test_exchanges_and_a_tuned_run(tmp_path):
    make_tiny("llama", tmp_path / "model", blocks=2)
    text = token_file(tmp_path / "c.npy", 20, 128)  # with the rows of its own two batches, gradients of four
    spec = {"bits": 3, "group_size": 32, "own_tokens": 500, "fisher_tokens": 3072, "tune_epochs": 2}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    status, _, err = ended(torchrun(Path(__file__).parent / "exchange.py", tmp_path))
    assert status == 0, err
    alone = {"out": tmp_path / "alone", "calibration": str(text), "heldout": "none", "device": "cpu"}
    made = quantize_model(tmp_path / "model", QuantSpec(**spec), **alone)
    tuning = made.report["tuning"]
    assert tuning["kl_after"] < tuning["kl_before"] and made.report["identity"]["own_rows"] == 4
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [each.pop("first") for each in found] == [True, False]
    assert sorted(each.pop("spoke") for each in found) == [False, True]
    assert [each.pop("devices") for each in found] == [["cpu", "cuda:0"], ["cpu", "cuda:1"]]
    for each in found:
        assert each == {
            "sum": [3.0, 1.0],
            "rows": [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]],
            "columns": [[0, 1, 1], [0, 1, 1]],
            "from_first": [7],
            "same_hessian": [True, True],
            "patience": 30,
            "refused": "device 'cuda:0' is one GPU for 2 ranks; cuda gives each its own",
        }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Flags of a run on a tiny model, and the files that one process writes."""
    folder = tmp_path_factory.mktemp("ranks")
    make_tiny("llama", folder / "model", blocks=BLOCKS)
    text = token_file(folder / "c.npy", 40, 128)  # three batches
    flags = ["--model", folder / "model", "--calibration", text, "--heldout", "none", "--bits", 3, "--group", 32]
    quantize.main([str(flag) for flag in (*flags, "--out", folder / "alone")])
    return flags, hashes(folder / "alone")


def rank_of(pid: str) -> str:
    values = Path("/proc", pid, "environ").read_bytes().split(b"\0")
    return next((value[5:].decode() for value in values if value.startswith(b"RANK=")), "")


def ranks_alive(launcher: subprocess.Popen) -> list[str]:
    """Process numbers of what torchrun has started; none once it has ended itself."""
    try:
        return Path("/proc", str(launcher.pid), "task", str(launcher.pid), "children").read_text().split()
    except OSError:
        return []


def kill_rank(launcher: subprocess.Popen, rank: int):
    """Kills one of the two processes as the system would."""
    (pid,) = [child for child in ranks_alive(launcher) if rank_of(child) == str(rank)]
    subprocess.run(["kill", "-KILL", pid], check=True)


@pytest.mark.timeout(900)  # five starts of Python; on a busy machine each takes its time
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_all_and_resume_completes(tiny, tmp_path, capsys, rank):
    flags, expected = tiny
    out, work = tmp_path / "out", tmp_path / "out.ptq-work"
    arguments = ["-m", "ptq.quantize", *flags, "--out", out]
    launcher = torchrun(*arguments)
    while launcher.poll() is None and not (work / "block-00001.safetensors").exists():
        time.sleep(0.005)
    kill_rank(launcher, rank)
    start = time.monotonic()
    while launcher.poll() is None and ranks_alive(launcher):
        time.sleep(0.05)
    assert time.monotonic() - start < SECONDS
    status, printed, err = ended(launcher)
    assert status != 0 and not printed
    said = "error: another rank has ended, so all stop; the same command with --resume goes on\n"
    assert err.count("error: ") == err.count(said) == 1  # among the lines of torchrun's own log, wherever it comes
    assert "RankLost" not in err and work.exists() and not out.exists()

    with pytest.raises(SystemExit) as left:
        quantize.main([str(flag) for flag in (*flags, "--out", out, "--resume")])
    assert left.value.code == 2 and capsys.readouterr().err.endswith("the run is another one: ranks 2 -> 1\n")

    status, printed, err = ended(torchrun(*arguments, "--resume"))
    assert status == 0, err
    assert printed.count("written:") == 1 and hashes(out) == expected and not work.exists()

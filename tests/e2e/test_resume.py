"""Runs that are killed, interrupted, repeated or damaged, and what --resume makes of them: always the same files."""

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import command, environment, hashes, read_report, run, token_file
from tiny_models import make_tiny

from ptq import QuantSpec, quantize, quantize_model
from ptq.spec import EFFORTS
from ptq.workdir import WorkFolder

BLOCKS = 4
TINY = ["--model", "model", "--calibration", "c.npy", "--heldout", "h.npy", "--bits", "3", "--group", "32"]
OUT, WORK = Path("out"), Path("out.ptq-work")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A tiny model, tokens, and in `expected` an uninterrupted run's files."""
    folder = tmp_path_factory.mktemp("pristine")
    make_tiny("llama", folder / "model", blocks=BLOCKS, shards=2)
    token_file(folder / "c.npy", 6, 32)
    token_file(folder / "h.npy", 2, 32, seed=1)
    flags = [str(folder / flag) if (folder / flag).exists() else flag for flag in TINY]
    quantize.main([*flags, "--out", str(folder / "expected")])
    return folder


@pytest.fixture
def here(pristine, tmp_path, monkeypatch):
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny(*flags):
    quantize.main([*TINY, "--out", "out", *flags])


def assert_finished():
    assert hashes(OUT) == hashes(Path("expected")) and len(hashes(OUT)) >= 4
    assert not WORK.exists()


def refused(capsys, *flags):
    """The one line on stderr of a refused run."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        tiny(*flags)
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1
    return error


def interrupt(method, *, after=0, flags=()):
    """Runs with a Ctrl-C at the end of the call of a work folder's method that follows `after` calls."""
    original, calls = getattr(WorkFolder, method), []

    def interrupted(self, *arguments):
        original(self, *arguments)
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(WorkFolder, method, interrupted)
        tiny(*flags)
    assert left.value.code == 130


# Runs of a tiny model in this process


def test_same_run_twice(here):
    tiny()
    assert_finished()


def test_spilled_activations_change_nothing(here):
    options = dict(calibration="c.npy", heldout="h.npy", activation_budget=0)
    quantize_model("model", QuantSpec(bits=3, group_size=32), out="out", **options)
    assert_finished()


def test_resume_without_earlier_work(here):
    tiny("--resume")
    assert_finished()
    assert not read_report(OUT)["resumed"]


@pytest.mark.parametrize("done", range(1, BLOCKS + 1))
def test_interrupted_after_a_block(here, capsys, done):
    interrupt("save_block", after=done - 1)
    assert capsys.readouterr().err == "interrupted; the same command with --resume goes on\n"
    assert len(list(WORK.glob("block-*"))) == done and not OUT.exists()
    assert refused(capsys).startswith("error: out.ptq-work: an interrupted run left its work here; go on with --resume")
    tiny("--resume")
    assert_finished()
    assert read_report(OUT)["resumed"]


def test_changed_run_is_refused_with_the_difference(here, capsys):
    interrupt("save_block")
    assert "cannot resume, the run is another one: spec.bits 3 -> 4\n" in refused(capsys, "--resume", "--bits", "4")
    error = refused(capsys, "--resume", "--samples", "5", "--asym")
    assert "calibration.fingerprint" in error and "calibration.samples 6 -> 5; spec.sym True -> False" in error
    config = Path("model/config.json").read_bytes()
    Path("model/config.json").write_bytes(config.replace(b"silu", b"relu"))
    assert "model '" in refused(capsys, "--resume")
    Path("model/config.json").write_bytes(config)
    tiny("--resume")
    assert_finished()


def test_resume_after_the_end_says_what_the_run_said(here, capsys):
    tiny()
    said, written = capsys.readouterr().out, OUT.stat().st_mtime_ns
    tiny("--resume")
    assert capsys.readouterr().out == said and "written: out" in said and OUT.stat().st_mtime_ns == written
    assert "out: exists already and is not this run's" in refused(capsys, "--resume", "--seed", "1")
    assert "out: exists already" in refused(capsys)


def test_killed_between_rename_and_removal(here, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(WorkFolder, "discard", interrupted)
        tiny()
    assert OUT.exists() and WORK.exists()
    capsys.readouterr()
    tiny("--resume")
    assert "written: out" in capsys.readouterr().out
    assert_finished()


def test_killed_while_the_work_folder_is_removed(here):
    interrupt("save_block", after=1)
    (WORK / "run.json").unlink()  # whose blocks these are is not known any more
    tiny("--bits", "4")
    assert read_report(OUT)["identity"]["spec"]["bits"] == 4 and not WORK.exists()


def flip(path, where):
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("block", "damage"),
    [
        (0, lambda path: path.write_bytes(path.read_bytes()[:-1])),
        (1, lambda path: path.write_bytes(b"")),
        (2, lambda path: flip(path, 0.02)),
        (0, lambda path: flip(path, 0.6)),
        (1, lambda path: flip(path, 0.999)),
        (1, lambda path: path.unlink()),
    ],
    ids=["cut short", "empty", "header", "middle", "end", "gone"],
)
def test_damaged_block_is_done_again(here, block, damage):
    interrupt("save_block", after=2)
    damage(WORK / f"block-{block:05d}.safetensors")
    tiny("--resume")
    assert_finished()


def test_damaged_record_of_the_run(here, capsys):
    interrupt("save_block")
    (WORK / "run.json").write_text("{")
    assert "run.json: damaged; delete out.ptq-work and start again" in refused(capsys, "--resume")


def test_effort_interrupted_after_each_step(here, monkeypatch):
    """What the model wrote, what gradients said, blocks, tuning: each is kept, and the files are the same."""
    monkeypatch.setitem(EFFORTS, "balanced", {"own_tokens": 64, "fisher_tokens": 128, "tune_epochs": 1})
    balanced = [*TINY, "--effort", "balanced"]
    quantize.main([*balanced, "--out", "whole"])
    for n, method in enumerate(("save_part", "save_fisher", "save_block", "save_tuned_block", "save_tuned")):
        interrupt(method, flags=["--effort", "balanced", *(["--resume"] if n else [])])
    tiny("--effort", "balanced", "--resume")
    assert hashes(OUT) == hashes(Path("whole")) != hashes(Path("expected")) and not WORK.exists()


# Processes of their own on the demo model


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Flags of a short demo run, an uninterrupted run's files and its seconds."""
    folder = tmp_path_factory.mktemp("demo")
    flags = ["--samples", 4, "--seqlen", 64, "--heldout", token_file(folder / "h.npy", 4, 64, vocab=4096)]
    start = time.monotonic()
    done = run("quantize", *flags, "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    return [str(flag) for flag in flags], hashes(folder / "out"), time.monotonic() - start


def signalled(arguments, number, *, at, then=None):
    """Starts a run and sends a signal once `at` is true; (status, stderr)."""
    process = subprocess.Popen(
        command("quantize", *arguments),
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )
    while process.poll() is None and not at():
        time.sleep(0.005)
    if then:
        then()
    process.send_signal(number)
    return process.wait(timeout=60), process.communicate()[1]


def test_kill_and_second_process(demo, tmp_path, capsys):
    flags, expected, _ = demo
    out, work = tmp_path / "out", tmp_path / "out.ptq-work"
    arguments, locked = [*flags, "--out", str(out)], []

    def start_a_second():
        with pytest.raises(SystemExit) as left:
            quantize.main([*arguments, "--resume"])
        locked.append((left.value.code, capsys.readouterr().err))

    status, _ = signalled(arguments, signal.SIGKILL, at=(work / "block-00001.safetensors").exists, then=start_a_second)
    assert locked == [(2, f"error: {work}: another process is working on this output\n")]
    assert status == -signal.SIGKILL and work.exists() and not out.exists()
    done = run("quantize", *arguments, "--resume")
    assert done.returncode == 0 and done.stderr == "" and hashes(out) == expected and not work.exists()


def test_interrupt_then_kill_while_writing(demo, tmp_path):
    flags, expected, _ = demo
    out, work = tmp_path / "out", tmp_path / "out.ptq-work"
    arguments = [*flags, "--out", str(out)]
    status, said = signalled(arguments, signal.SIGINT, at=(work / "block-00000.safetensors").exists)
    assert (status, said) == (130, "interrupted; the same command with --resume goes on\n")
    status, _ = signalled([*arguments, "--resume"], signal.SIGKILL, at=(work / "artefact" / "config.json").exists)
    assert status == -signal.SIGKILL and work.exists() and not out.exists()
    done = run("quantize", *arguments, "--resume")
    assert done.returncode == 0 and hashes(out) == expected and not work.exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kill_at_ten_random_moments(demo, tmp_path):
    flags, expected, seconds = demo
    moments, ends = random.Random(0), []
    for i in range(10):
        arguments = [*flags, "--out", str(tmp_path / f"out{i}")]
        end = time.monotonic() + moments.uniform(0, seconds)
        status, _ = signalled(arguments, signal.SIGKILL, at=lambda end=end: time.monotonic() > end)
        blocks = len(list((tmp_path / f"out{i}.ptq-work").glob("block-*.safetensors")))
        ends.append(f"{status}: {blocks} blocks")
        done = run("quantize", *arguments, "--resume")
        assert done.returncode == 0, done.stderr
        assert hashes(tmp_path / f"out{i}") == expected and not (tmp_path / f"out{i}.ptq-work").exists()
    print(ends)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_effort_killed_in_each_step(here):
    """As it is used: killed while the model writes, after that, among gradients, among blocks, in tuning."""
    flags = [*TINY, "--effort", "balanced"]
    assert run("quantize", *flags, "--out", "whole").returncode == 0
    moments = ("run.json", "own-text.safetensors", "fisher-00001.safetensors", "block-00001.safetensors")
    for n, moment in enumerate((*moments, f"block-{BLOCKS - 1:05d}.safetensors")):
        arguments = [*flags, "--out", "out", *(["--resume"] if n else [])]
        assert signalled(arguments, signal.SIGKILL, at=(WORK / moment).exists)[0] == -signal.SIGKILL
    assert run("quantize", *flags, "--out", "out", "--resume").returncode == 0
    assert hashes(OUT) == hashes(Path("whole")) and not WORK.exists()

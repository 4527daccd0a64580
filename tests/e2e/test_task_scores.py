"""Task scores through our path: the harness's own to the last bit; cached, resumed, clear about what is missing."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from commands import command, environment, token_file
from damage import refused
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptq import evaluate, quantize
from ptq.convert import convert
from ptq.demo import DEMO
from ptq.evaluation import harness
from ptq.evaluation.answers import AnswerStore
from ptq.load import load_model
from ptq.reload import open_weights

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

QUESTIONS = [
    {"query": f"Question: {a} and {b} make what?", "choices": [str(a + b), str(a * b), "none"], "gold": (a * b) % 2}
    for a in range(5)
    for b in range(6)
]
ZEROSHOT = ("arc_easy", "arc_challenge", "piqa", "winogrande", "hellaswag", "boolq", "openbookqa", "mathqa")
ZEROSHOT += ("lambada_openai",)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A model, `packed`: the same quantized, and a folder of questions."""
    folder = tmp_path_factory.mktemp("pristine")
    make_tiny("llama", folder / "model")
    tokens = token_file(folder / "c.npy", 4, 32)
    flags = f"--bits 2 --group 32 --model {folder}/model --calibration {tokens} --heldout none --out {folder}/packed"
    quantize.main(flags.split())
    (folder / "questions").mkdir()
    for name in ("arc_easy", "hellaswag"):
        (folder / f"questions/{name}.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    return folder


@pytest.fixture
def here(pristine, tmp_path, monkeypatch):
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ours(model, tokenizer, names, data_dir, **options):
    return harness.run_tasks(model, tokenizer, harness.load_tasks(names, data_dir), AnswerStore(None), **options)


def flat(results):
    """The harness's results, without names and lengths."""
    return {
        (task, metric.partition(",")[0]): value
        for task, figures in results["results"].items()
        for metric, value in figures.items()
        if "," in metric
    }


def assert_same(scores, theirs):
    assert theirs and len(scores) * 2 == len(theirs)
    for score in scores:
        assert score.value == theirs[score.task, score.metric], score
        assert score.stderr == theirs[score.task, f"{score.metric}_stderr"], score


def test_scores_are_those_of_the_harness_s_own_model(shared):
    """Full precision, real questions: every value and every standard error equal, not close."""
    data = shared / "data/zeroshot"
    loaded = load_model(DEMO)
    scores = ours(loaded.model, loaded.tokenizer, ZEROSHOT, data, limit=12)
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(DEMO), "dtype": "float32"},
        tasks=[*harness.load_tasks(ZEROSHOT, data)["tasks"].values()],
        device="cpu",
        batch_size=8,
        limit=12,
        task_manager=TaskManager(include_defaults=False),
    )
    assert_same(scores, flat(theirs))
    assert {score.questions for score in scores} == {12}


def test_a_packed_folder_scores_what_its_dequantized_weights_score(here):
    loaded, packed = load_model("packed"), open_weights("packed")
    scores = ours(loaded.model, loaded.tokenizer, ("arc_easy", "hellaswag"), here / "questions")
    plain = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32).eval()
    before = ours(plain, AutoTokenizer.from_pretrained("model"), ("arc_easy", "hellaswag"), here / "questions")
    plain.load_state_dict(packed.read(packed.names()), strict=False)
    after = ours(plain, AutoTokenizer.from_pretrained("model"), ("arc_easy", "hellaswag"), here / "questions")
    assert scores == after != before


def test_a_folder_and_its_gguf_twin_score_alike(here):
    """The same values in two files: every score and error equal, not close."""
    quantize.main("--bits 4 --group 32 --model model --calibration c.npy --heldout none --out four".split())
    assert convert(here / "four", here / "four.gguf", embed_type="F32") == {"Q4_0": 14}
    folder, twin = load_model("four"), load_model("four.gguf")
    assert all(torch.equal(a, b) for a, b in zip(folder.model.parameters(), twin.model.parameters(), strict=True))
    names, data = ("arc_easy", "hellaswag"), here / "questions"
    scores = [ours(loaded.model, loaded.tokenizer, names, data) for loaded in (folder, twin)]
    assert scores[0] == scores[1] and len(scores[0]) == 4


def evaluate_json(capsys, *flags):
    evaluate.main([*flags, "--json", "--data-dir", "questions", "--cache", "cache"])
    return json.loads(capsys.readouterr().out)


def test_a_second_run_asks_nothing_and_another_artefact_does(here, capsys, monkeypatch):
    first = evaluate_json(capsys, "model", "--tasks", "arc_easy")
    other = evaluate_json(capsys, "packed", "--tasks", "arc_easy")
    assert len(list(Path("cache").iterdir())) == 2 and other["scores"] != first["scores"]
    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", lambda *_, **__: pytest.fail("a model was asked"))
    assert evaluate_json(capsys, "model", "--tasks", "arc_easy") == first


def test_a_killed_run_goes_on_where_it_was(here, capsys, monkeypatch):
    whole = evaluate_json(capsys, "model", "--tasks", "arc_easy")
    (answers,) = Path("cache").iterdir()
    lines = answers.read_text().splitlines()
    answers.write_text("\n".join(lines[:40]) + "\n" + lines[40][:9])
    asked = []
    before = AnswerStore.add_partial
    monkeypatch.setattr(AnswerStore, "add_partial", lambda self, *args: (asked.append(args[1]), before(self, *args)))
    assert evaluate_json(capsys, "model", "--tasks", "arc_easy") == whole
    assert len(set(asked)) == len(lines) - 40
    assert len(answers.read_text().splitlines()) == len(lines)


def test_a_preset_runs_what_is_there_and_names_what_is_not(here, capsys):
    evaluate.main("model --tasks qat --limit 4 --data-dir questions --cache cache".split())
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert lines[0] == ["metric", "value", "stderr", "samples"]
    assert [line[:2] for line in lines[1:5]] == [
        ["arc_easy", "acc"], ["arc_easy", "acc_norm"], ["hellaswag", "acc"], ["hellaswag", "acc_norm"],
    ]  # fmt: skip
    assert all(line[3] == "±" and line[-1] == "4" for line in lines[1:5]) and "QA Avg" not in printed
    assert printed.endswith("not in questions: arc_challenge, piqa, winogrande, mmlu\n")


BAD = {
    "--tasks ,": "--tasks ',' names no task; presets: qat, greenbit, onebit, starcoder",
    "--tasks piqa": "--data-dir questions: has no piqa.jsonl for the task piqa",
    "--tasks starcoder": "has no file for any of code2text",
    "--tasks arc_easy --data-dir nowhere": "--data-dir nowhere: there is no such folder",
    "--tasks arc_easy --limit 0": "--limit 0 must be at least 1",
    "--tasks arc_easy --batch-size 0": "--batch-size 0 must be at least 1",
    "--tasks arc_easy --device tpu": "device 'tpu'",
    "--tasks arc_easy --cache c.npy": "c.npy",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags(here, capsys, flags):
    refused(capsys, evaluate, ["model", "--data-dir", "questions", "--cache", "cache", *flags.split()], BAD[flags])


def test_without_the_harness(here, capsys, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    refused(capsys, evaluate, "model --tasks arc_easy --data-dir questions".split(), "pip install 'ptq[eval]'")


def raise_no_network():
    raise ConnectionError("no network")


@pytest.fixture
def few_tasks(monkeypatch):
    """The harness knows its ARC tasks only; reading all its definitions takes many seconds."""
    arc = str(Path(lm_eval.__file__).parent / "tasks/arc")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: TaskManager(include_defaults=False, include_path=arc))


def test_an_unknown_task_of_the_hub(here, capsys, few_tasks):
    words = "--tasks nosuch: the harness knows no such task"
    refused(capsys, evaluate, "model --tasks nosuch,arc_easy --cache cache".split(), words)


def test_without_network(here, capsys, few_tasks, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_session", raise_no_network)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", here / "empty")
    for offline in ("datasets.config.HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
        monkeypatch.setattr(offline, False)  # so that it is put back afterwards
    flags = "model --tasks arc_easy --cache cache".split()
    refused(capsys, evaluate, flags, "task arc_easy", "--data-dir a folder with arc_easy.jsonl")


def test_in_a_process_of_its_own_stderr_stays_empty(here):
    flags = "model --tasks arc_easy --limit 3 --data-dir questions --json".split()
    extra = environment(XDG_CACHE_HOME=str(here / "cache"))
    done = subprocess.run(command("evaluate", *flags), capture_output=True, text=True, env=extra)
    assert done.returncode == 0 and done.stderr == "" and len(json.loads(done.stdout)["scores"]) == 2
    assert len(os.listdir("cache/ptq")) == 1

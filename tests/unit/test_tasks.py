"""Presets and local files of questions; where a question is on the hub too, the harness asks the same of both."""

import json

import pytest
from datasets import Dataset

from calibration.errors import InputError
from ptq.evaluation.harness import Score, load_tasks, preset_average
from ptq.evaluation.published.rows import published_rows
from ptq.evaluation.tasks import FILES, PRESETS, choose_tasks, local_config

ARC = {"question": "Which is red?", "choices": {"text": ["sky", "blood"], "label": ["A", "B"]}, "answerKey": "B"}
ARC_HERE = {"query": "Question: Which is red?", "choices": ["sky", "blood"], "gold": 1}
SAME = {  # a question as the hub has it, and as a local file has it
    "arc_easy": (ARC, ARC_HERE),
    "arc_challenge": (ARC, ARC_HERE),
    "openbookqa": (
        {"question_stem": "Red is", "choices": ARC["choices"], "answerKey": "A"},
        {"query": "Red is", "choices": ["sky", "blood"], "gold": 0},
    ),
    "piqa": (
        {"goal": "to sit", "sol1": "use a chair", "sol2": "use a spoon", "label": 0},
        {"query": "Question: to sit\n", "choices": ["use a chair", "use a spoon"], "gold": 0},
    ),
    "winogrande": (
        {"sentence": "Ann met Bea and _ left early.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        {"context_options": ["Ann met Bea and Ann", "Ann met Bea and Bea"], "continuation": "left early.", "gold": 1},
    ),
    "hellaswag": (
        {"ctx_a": "A man sits.", "ctx_b": "he", "activity_label": "Sitting", "endings": ["a", "b c"], "label": "1"},
        {"query": "Sitting: A man sits. He", "choices": ["a", "b c"], "gold": 1},
    ),
    "boolq": (
        {"passage": "Rain is wet.", "question": "is rain wet", "label": 1},
        {"query": "Passage: Rain is wet.\nQuestion: is rain wet?", "choices": ["no", "yes"], "gold": 1},
    ),
    "lambada_openai": ({"text": "the cat sat"}, {"context": "the cat", "continuation": "sat"}),
}


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed").TaskManager()


def write(folder, name, *rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def asked(task):
    """Texts of all requests of a task, metrics, and which answer it holds right."""
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests()
    doc = task.eval_docs[0]
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return [request.args for request in task.instances], gold, sorted(task.aggregation())


@pytest.mark.parametrize("name", SAME)
def test_a_local_question_is_asked_as_the_harness_asks_the_hub_s(harness, tmp_path, name, monkeypatch):
    theirs, ours = SAME[name]
    local = load_tasks((name,), write(tmp_path, FILES.get(name, name), ours))
    splits = dict.fromkeys(("train", "validation", "test"), Dataset.from_list([theirs]))
    monkeypatch.setattr("datasets.load_dataset", lambda **_: splits)
    hub = harness.load([name])
    assert asked(local["tasks"][name]) == asked(hub["tasks"][name])


def test_every_task_of_a_preset_is_the_harness_s(harness):
    assert not {name for preset in PRESETS.values() for name in preset.tasks} - set(harness.all_tasks)


def test_averages_are_those_of_the_published_tables():
    rows = [row for row in published_rows() if row.model == "Llama-2-7b-hf_2bit_int" and row.source == "bitdistiller"]
    scores = [Score(row.task, "acc", row.share, None, 1) for row in rows if row.error]
    name, value = preset_average("qat", [*scores, Score("piqa", "acc_norm", 0.9, None, 1)])
    assert name == "QA Avg" and round(100 * value, 2) == 56.92
    assert preset_average("qat", scores[:-1]) is None and preset_average("piqa", scores) is None


def test_greenbit_s_average_is_over_every_metric():
    rows = [row for row in published_rows() if row.model == "LLaMA 3B q2g8"]
    scores = [Score(row.harness_task, row.harness_metric, row.number, None, 1)
              for row in rows if row.task not in ("Average", "model size")]  # fmt: skip
    assert round(preset_average("greenbit", scores)[1], 4) == 0.5087


def test_names_and_what_a_folder_lacks(tmp_path):
    assert choose_tasks(" piqa, arc_easy,piqa") == (("piqa", "arc_easy"), ())
    assert choose_tasks("onebit") == (("wikitext", "hellaswag", "mathqa"), ())
    write(tmp_path, "hellaswag", ARC_HERE)
    assert choose_tasks("onebit", tmp_path) == (("hellaswag",), ("wikitext", "mathqa"))


BROKEN = {
    "": "holds no questions",
    "\n \n": "holds no questions",
    "[1]\n": "line 1: not a JSON object",
    "{}\n": "line 1: has none of the layouts query, choices, gold; context_options",
    json.dumps(ARC_HERE) + "\n\n{": "line 3: not a JSON object",
    json.dumps(ARC_HERE | {"gold": 2}): "line 1: gold 2 is not one of its 2 choices",
    json.dumps(ARC_HERE | {"gold": True}): "line 1: 'gold' must be a int",
    json.dumps(ARC_HERE | {"choices": []}): "line 1: its choices must be strings that are not empty",
    json.dumps(ARC_HERE | {"choices": ["a", ""]}): "line 1: its choices must be strings that are not empty",
    json.dumps(ARC_HERE) + "\n" + json.dumps({"query": 1, "choices": [], "gold": 0}): "line 2: 'query' must be a str",
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_one_line(tmp_path, content):
    (tmp_path / "piqa.jsonl").write_text(content)
    with pytest.raises(InputError) as refused:
        local_config("piqa", tmp_path)
    assert BROKEN[content] in str(refused.value) and "piqa.jsonl" in str(refused.value)


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "piqa.jsonl").write_bytes(b"{\xff}")
    with pytest.raises(InputError, match="not UTF-8 at byte 1"):
        local_config("piqa", tmp_path)

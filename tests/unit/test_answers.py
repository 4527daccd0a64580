"""The store of answers: nothing is asked twice, nothing that was answered is lost, and no artefact reads another's."""

import json
from types import SimpleNamespace

import pytest

from ptq.evaluation.answers import AnswerStore, artefact_hash


class Model:
    """A harness model that answers a request with the length of its text, and may be killed on the way."""

    def __init__(self, dies_after=None):
        self.asked, self.left = [], dies_after

    def set_cache_hook(self, hook):
        self.hook = hook

    def loglikelihood(self, requests, disable_tqdm):
        assert disable_tqdm
        for request in sorted(requests, key=lambda r: r.args):  # an order of its own, as the harness has
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            self.asked.append(request.args)
            self.hook.add_partial("loglikelihood", request.args, self.answer(request))
        return [self.answer(request) for request in requests]

    def answer(self, request):
        return (-float(len(request.args[1])) / 3, request.args[0] == "a")

    def loglikelihood_rolling(self, requests, disable_tqdm):
        self.asked.append(len(requests))
        return [0.1 + len(request.args[0]) for request in requests]

    def generate_until(self, requests, disable_tqdm):
        return [request.args[0] + request.args[1]["until"] for request in requests]


def requests(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


PAIRS = requests(("b", "xyz"), ("a", "x"), ("b", "xyz"), ("a", "é\n"))
ANSWERS = [(-1.0, False), (-1 / 3, True), (-1.0, False), (-2 / 3, True)]


def test_answers_come_in_the_order_asked_and_equal_requests_are_asked_once():
    model = Model()
    AnswerStore(None).attach(model)
    assert model.loglikelihood(PAIRS) == ANSWERS and len(model.asked) == 3


@pytest.mark.parametrize("cut", [0, 7])
def test_a_killed_run_goes_on_with_what_was_answered(tmp_path, cut):
    file = tmp_path / "new" / "answers.jsonl"
    killed = Model(dies_after=2)
    AnswerStore(file).attach(killed)
    with pytest.raises(KeyboardInterrupt):
        killed.loglikelihood(PAIRS)
    if cut:
        file.write_bytes(file.read_bytes()[:-cut])  # the last line was being written
    model = Model()
    AnswerStore(file).attach(model)
    assert model.loglikelihood(PAIRS) == ANSWERS
    assert len(model.asked) == (2 if cut else 1)
    again = Model()
    AnswerStore(file).attach(again)
    assert again.loglikelihood(PAIRS) == ANSWERS and not again.asked
    assert all(len(json.loads(line)) == 2 for line in file.read_text().splitlines())


def test_documents_are_asked_one_by_one():
    model = Model()
    AnswerStore(None).attach(model)
    assert model.loglikelihood_rolling(requests(("one",), ("three",))) == [3.1, 5.1] and model.asked == [1, 1]


def test_kinds_of_requests_are_told_apart(tmp_path):
    model = Model()
    AnswerStore(tmp_path / "answers.jsonl").attach(model)
    assert model.generate_until(requests(("x", {"until": "y"}), ("x", {"until": "z"}))) == ["xy", "xz"]
    assert model.loglikelihood_rolling(requests(("x",))) == [1.1]
    assert len(AnswerStore(tmp_path / "answers.jsonl")) == 3


def test_an_artefact_s_hash_is_of_all_its_bytes_and_not_of_its_report(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 20))
    (tmp_path / "tokenizer.json").write_text("{}")
    before = artefact_hash(tmp_path)
    (tmp_path / "ptq_report.json").write_text("1")
    (tmp_path / "notes.md").write_text("1")
    assert artefact_hash(tmp_path) == before
    with (tmp_path / "model.safetensors").open("r+b") as weights:
        weights.seek(1 << 19)  # the middle, which Checkpoint.fingerprint does not read
        weights.write(b"\1")
    changed = artefact_hash(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    alone = artefact_hash(tmp_path / "model.safetensors")
    assert len({before, changed, artefact_hash(tmp_path), alone}) == 4

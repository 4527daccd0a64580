"""Rows in chunks, and chunks shared out over threads."""

import threading

import pytest
import torch

import ptq.quantizers.chunks
from ptq.clock import Clock
from ptq.quantizers.chunks import (
    AT_ONCE,
    CHUNK,
    RELEASE_EVERY,
    ROWS,
    chunk_size,
    over_chunks,
    row_chunks,
    row_cuts,
    threads_of,
)


def test_chunks_are_the_rows_of_the_stack():
    weights = [torch.arange(rows * 4.0).view(rows, 4) + 1000 * rows for rows in (70, 3, 50)]
    rows = slice(5, 120)
    chunks = list(row_chunks(weights, row_cuts(rows, 4, 4 * (ROWS + 1))))
    assert [chunk.shape for chunk in chunks] == [(4, n) for n in (32, 32, 32, 19)]
    assert torch.equal(torch.cat(chunks, 1).T, torch.cat(weights)[rows])
    assert next(row_chunks(weights, row_cuts(slice(0, 123), 4, 1))).shape[1] == ROWS, "a chunk has ROWS rows at least"


def test_all_threads_together_hold_no_more():
    assert [chunk_size(threads) for threads in (1, 2, 16)] == [CHUNK, CHUNK, AT_ONCE // 16]


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_results_come_in_order_whichever_thread_was_first():
    assert threads_of(torch.device("cpu")) == 3 and threads_of(torch.device("cuda")) == 1
    clock, taken, others = Clock(), [], threading.Event()

    def work(own, k, x):
        with own.phase("work"):
            taken.append((k, threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))
            if k == 0:
                assert others.wait(60), "the first chunk waits until another thread has done the second"
            if k == 1:
                others.set()
            return x + k

    chunks = ((k, torch.tensor(10.0)) for k in range(6))
    with clock.phase("solve"):
        assert [float(x) for x in over_chunks(work, chunks, clock, 3)] == [10, 11, 12, 13, 14, 15]
    assert len({thread for _, thread, _, _ in taken}) > 1 and threading.get_ident() not in {t for _, t, _, _ in taken}
    assert {(count, gradients) for _, _, count, gradients in taken} == {(1, False)}
    assert torch.get_num_threads() == 3
    assert clock.seconds["work"] > 0 and abs(sum(clock.seconds.values()) - clock.total) < 0.1


@pytest.mark.usefixtures("three_threads")
def test_an_error_in_a_thread_is_the_callers():
    def work(own, k):
        if k == 2:
            raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"):
        over_chunks(work, ((k,) for k in range(5)), Clock(), 3)
    assert torch.get_num_threads() == 3


def test_one_thread_is_the_callers_own():
    clock = Clock()
    assert over_chunks(lambda own, k: (own is clock, threading.get_ident(), k), [(1,)], clock, 1) == [
        (True, threading.get_ident(), 1)
    ]


@pytest.mark.parametrize("threads", [1, 2])
def test_what_chunks_free_goes_back_on_the_way(threads, monkeypatch):
    released, chunks = [], [(k,) for k in range(2 * RELEASE_EVERY + 1)]
    monkeypatch.setattr(ptq.quantizers.chunks, "release_freed", lambda: released.append(None))
    assert over_chunks(lambda own, k: k, chunks, Clock(), threads) == list(range(len(chunks)))
    assert len(released) == 2

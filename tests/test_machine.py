"""What a process may use of the machine; threads that work ahead, in order and bounded."""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
import time

import pytest

from hear_ssam import pretrain
from hear_ssam.evaluation import evaluate
from hear_ssam.machine import usable_cpus, work_ahead


@pytest.fixture
def one_of_many(monkeypatch):
    """As under `taskset -c 3`."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)


def test_affinity_counts_where_there_is_one(one_of_many, monkeypatch):
    assert usable_cpus() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cpus() == 64


def test_commands_start_no_more_workers_than_they_may_run(one_of_many, monkeypatch, tmp_path):
    subparsers = argparse.ArgumentParser().add_subparsers()
    pretrain.add_parser(subparsers)
    assert subparsers.choices["corpus"].parse_args(["store", "--audio", "x"]).workers == 1
    seen = []
    monkeypatch.setattr(evaluate, "run_jobs", lambda jobs, store, workers, *_: seen.append(workers))
    monkeypatch.setattr(evaluate, "find_tasks", lambda *_: {})
    evaluate.run_evaluation(["tests.tiny_hear"], tasks_dir=tmp_path, results_dir=tmp_path)
    assert seen == [1]


def test_results_come_in_order_and_with_their_errors() -> None:
    def work(item: int) -> int:
        time.sleep(0.001 * (item % 3))
        return 10 // (item - 5)

    outcomes = list(work_ahead(work, range(9), workers=3, depth=6))
    assert [item for item, _ in outcomes] == list(range(9))
    assert [future.result() for item, future in outcomes if item != 5] == [10 // (i - 5) for i in range(9) if i != 5]
    with pytest.raises(ZeroDivisionError):
        outcomes[5][1].result()


def test_a_bounded_number_is_under_way() -> None:
    under_way, most, lock = 0, 0, threading.Lock()

    def work(item: int) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)

    for _, future in work_ahead(work, iter(range(50)), workers=2, depth=4):
        future.result()
        with lock:
            under_way -= 1
        time.sleep(0.002)  # a slow reader: the threads could run far ahead
    assert under_way == 0 and 2 <= most <= 4


def test_closing_waits_for_nothing() -> None:
    hold, begun = threading.Event(), []

    def work(item: int) -> None:
        begun.append(item)
        if item:
            hold.wait(30)

    with contextlib.closing(work_ahead(work, range(50), workers=1, depth=4)) as outcomes:
        next(outcomes)[1].result()
    assert len(begun) <= 2  # the closing came back while the second was held
    hold.set()

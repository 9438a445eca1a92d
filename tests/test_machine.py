"""What a process may use of the machine."""

import argparse
import os

import pytest

from hear_ssam import corpus, evaluate
from hear_ssam.machine import usable_cpus


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
    corpus.add_parser(subparsers)
    assert subparsers.choices["corpus"].parse_args(["store"]).workers == 1
    seen = []
    monkeypatch.setattr(evaluate, "run_jobs", lambda jobs, store, workers, failures: seen.append(workers))
    monkeypatch.setattr(evaluate, "find_tasks", lambda *_: {})
    evaluate.run_evaluation(["tests.tiny_hear"], tasks_dir=tmp_path, results_dir=tmp_path)
    assert seen == [1]

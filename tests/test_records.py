"""The store of results: whole lines, the last of a key counts, a torn line is not a result."""

import json

import pytest

from hear_ssam import HearSsamError
from hear_ssam.evaluation.records import KEY, STORE, append, finite, read


def record(**values):
    return {**dict.fromkeys(KEY, "x"), "seed": 0, "fold": None, "score": 0.5, **values}


def test_what_was_appended_is_read_and_a_later_line_replaces_its_key(tmp_path):
    store = tmp_path / "new folder" / STORE
    append(store, [record(seed=0), record(seed=1)])
    append(store, [record(seed=0, score=0.75)])
    assert read(store) == read(store.parent) == [record(seed=0, score=0.75), record(seed=1)]


def test_a_torn_line_is_skipped_and_closed_by_the_next_append(tmp_path):
    store = tmp_path / STORE
    append(store, [record(seed=0), record(seed=1)])
    store.write_bytes(store.read_bytes()[:-10])
    assert [r["seed"] for r in read(store)] == [0]
    append(store, [record(seed=2)])
    assert [r["seed"] for r in read(store)] == [0, 2]


def test_a_full_disk_leaves_all_records_or_none(tmp_path):
    resource = pytest.importorskip("resource")
    store = tmp_path / STORE
    append(store, [record(seed=0)])
    before, (_, most) = store.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, most))
    try:
        with pytest.raises(HearSsamError, match="disk is full"):
            append(store, [record(seed=1), record(seed=2)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert store.read_bytes() == before


def test_scores_that_are_not_finite_become_null(tmp_path):
    append(tmp_path / STORE, [record(score=finite(float("inf")))])
    assert json.loads((tmp_path / STORE).read_text())["score"] is None
    with pytest.raises(ValueError, match="JSON compliant"):
        append(tmp_path / STORE, [record(score=float("nan"))])


def test_bad_stores_are_named(tmp_path):
    with pytest.raises(HearSsamError, match=r"records\.jsonl: cannot be read: .*; `hear-ssam evaluate`"):
        read(tmp_path)
    (tmp_path / STORE).write_text('{"a": 1}\n')
    with pytest.raises(HearSsamError, match="line 1 is not a result record"):
        read(tmp_path)
    (tmp_path / "scores.xlsx").write_bytes(bytes(range(256)))
    assert read(tmp_path / "scores.xlsx") == []
    with pytest.raises(HearSsamError, match=r"records\.jsonl: cannot be written: .*; make room"):
        append(tmp_path / STORE / STORE, [record()])

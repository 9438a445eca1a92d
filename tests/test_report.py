"""Tables are views of records: means over seeds, intervals, directions, formats."""

import csv
import io
import statistics

import pytest

from hear_ssam import cli
from hear_ssam.records import append
from hear_ssam.report import comma_separated, interval, markdown, tables, terminal


def record(model, task, seed, score, *, metric="top1_acc", fold=None, maximize=True, digest="", protocol="ssam"):
    return {
        "model": model, "checkpoint_sha256": digest, "task": task, "version": "1", "protocol": protocol,
        "probe": "exact", "seed": seed, "fold": fold, "metric": metric, "score": score,
        "primary": metric != "mAP", "maximize": maximize,
    }  # fmt: skip


RECORDS = [
    *(record("ours", "birds", seed, score) for seed, score in enumerate((0.80, 0.84, 0.82))),
    *(record("ours", "birds", seed, 0.99, fold="fold00") for seed in range(3)),
    record("ours", "birds", 0, 0.11, metric="mAP"),
    record("theirs", "birds", 0, 0.79),
    record("ours", "doors", 0, 0.5, metric="segment_1s_er", maximize=False),
    record("theirs", "doors", 0, 0.25, metric="segment_1s_er", maximize=False),
    record("theirs", "waves", 0, 0.33),
    record("theirs", "waves", 1, None),
]


def test_interval_is_students():
    # t(0.975; 2) = 4.302653
    assert interval([0.80, 0.84, 0.82]) == pytest.approx(4.302653 * 0.02 / 3**0.5, rel=1e-6)
    assert interval([0.8]) is None


def test_a_cell_is_the_mean_over_seeds_of_the_task_score():
    (table,) = tables(RECORDS)
    assert table.tasks == {"birds": "top1_acc", "doors": "segment_1s_er", "waves": "top1_acc"}
    cell = table.cells["birds", "ours"]
    assert (cell.mean, cell.seeds) == (pytest.approx(0.82), 3)
    assert cell.half_width == interval([0.80, 0.84, 0.82])
    assert ("waves", "ours") not in table.cells
    assert table.cells["waves", "theirs"].seeds == 1  # the score that is not finite does not count


def test_the_best_follows_the_direction_of_the_metric():
    (table,) = tables(RECORDS)
    assert table.best("birds") == statistics.mean((0.8, 0.84, 0.82))
    assert table.best("doors") == 0.25  # an error rate
    assert table.best("waves") is None  # no rival


def test_formats_mark_the_best_and_state_the_protocol():
    assert "| birds | top1_acc | **82.0 ± 5.0** | 79.0 |" in markdown(RECORDS)
    assert "| doors | segment_1s_er | 0.5 | **0.2** |" in markdown(RECORDS)
    assert "| waves | top1_acc | – | 33.0 |" in markdown(RECORDS)
    assert "*82.0 ± 5.0*" in terminal(RECORDS) and "protocol ssam, probe exact, 1–3 seeds" in terminal(RECORDS)


def test_checkpoints_of_one_name_and_protocols_are_kept_apart():
    records = [record("m", "birds", 0, 0.5, digest=letter * 64) for letter in "ab"]
    first, second = tables([*records, record("m", "birds", 0, 0.6, protocol="heareval")])
    assert first.models == ["m@aaaaaaaa", "m@bbbbbbbb"]
    assert (first.protocol, second.protocol) == ("ssam", "heareval")


def test_csv_has_fractions_and_marks_folds():
    rows = list(csv.DictReader(io.StringIO(comma_separated(RECORDS))))
    assert len(rows) == len(RECORDS)
    assert {"model", "task", "protocol", "seed", "metric", "score"} <= rows[0].keys()
    assert float(rows[0]["score"]) == 0.8
    assert [row["fold"] for row in rows[2:4]] == ["", "fold00"]
    assert rows[-1]["score"] == ""


def test_the_command(tmp_path, capsys):
    append(tmp_path / "records.jsonl", RECORDS)
    assert cli.main(["report", str(tmp_path), "--format", "csv"]) == 0
    assert capsys.readouterr().out == comma_separated(RECORDS)
    assert cli.main(["report", str(tmp_path), "--protocol", "heareval"]) == 2
    assert "holds no results of protocol heareval" in capsys.readouterr().err

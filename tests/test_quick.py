"""Probes of seconds: what they learn, choose and skip; a few clips of a task; how probes agree."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from hear_ssam import HearSsamError, cli
from hear_ssam.evaluation.evaluate import run_evaluation
from hear_ssam.evaluation.preview import audio_seconds, limited, probe_seconds
from hear_ssam.evaluation.quick import STRENGTHS, draw, quick_probe, shortage
from hear_ssam.evaluation.records import predictions_file, read
from hear_ssam.evaluation.report import page
from hear_ssam.evaluation.rows import open_embeddings
from hear_ssam.evaluation.scores import SCORES, Score
from hear_ssam.evaluation.tables import agreement, markdown, terminal
from hear_ssam.evaluation.tasks import read_task

from .tiny_tasks import write_task

MODULE = "tests.tiny_hear"
QUICK = ["knn", "logreg", "fewshot"]


@pytest.fixture
def run(tmp_path, serial):
    def evaluate(*modules, **options):
        places = {"tasks_dir": tmp_path / "tasks", "results_dir": tmp_path / "results", "workers": 1}
        return run_evaluation(modules or (MODULE,), **places, **options)

    return evaluate


def noise(folder, rows=90, dim=12, classes=3, multilabel=False, splits=("train", "valid", "test"), spread=1.0):
    """A folder of embeddings in heareval's layout: Gaussian clusters, one per class."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(classes, dim))
    folder.mkdir(parents=True)
    kind, score = ("multilabel", "mAP") if multilabel else ("multiclass", "top1_acc")
    metadata = {
        "task_name": folder.name, "version": "1", "embedding_type": "scene", "splits": list(splits),
        "prediction_type": kind, "evaluation": [score],
        "split_mode": "trainvaltest" if "train" in splits else "new_split_kfold",
    }  # fmt: skip
    (folder / "task_metadata.json").write_text(json.dumps(metadata))
    (folder / "labelvocabulary.csv").write_text("idx,label\n" + "".join(f"{i},{i}\n" for i in range(classes)))
    for split in splits:
        target = rng.random((rows, classes)) < 0.4 if multilabel else np.eye(classes)[rng.integers(0, classes, rows)]
        x = (target @ centres + spread * rng.normal(size=(rows, dim))).astype(np.float32) * 30 + 5
        x.tofile(folder / f"{split}.embeddings.npy")
        labels = [[str(i) for i in np.flatnonzero(row)] for row in target]
        (folder / f"{split}.embedding-dimensions.json").write_text(json.dumps(x.shape))
        (folder / f"{split}.target-labels.pkl").write_bytes(pickle.dumps(labels))
        (folder / f"{split}.json").write_text(json.dumps({f"{i}.wav": row for i, row in enumerate(labels)}))
    return folder


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("splits", [("train", "valid", "test"), ("a", "b", "c", "d")])
@pytest.mark.parametrize("probe", ["knn", "logreg", "fewshot8"])
def test_learns_clusters(tmp_path, probe, splits, multilabel):
    """Far above chance wherever the task's splits and labels are; predictions are probabilities."""
    task, rows = open_embeddings(noise(tmp_path / "task", multilabel=multilabel, splits=splits))
    folds = quick_probe(task, rows, probe, 0)
    assert [fold.fold for fold in folds] == [split.test for split in task.data_splits]
    for fold in folds:
        assert fold.scores[task.scores[0]] > (0.65 if "few" in probe else 0.75 if multilabel else 0.85)
        assert fold.prediction.shape == fold.target.shape and fold.prediction.dtype == np.float32
        assert 0 <= fold.prediction.min() and fold.prediction.max() <= 1
        assert multilabel or fold.prediction.sum(1) == pytest.approx(1, abs=1e-5)


def test_logreg_is_scikit_learns_with_the_strength_that_validation_chose(tmp_path, monkeypatch):
    task, rows = open_embeddings(noise(tmp_path / "task", spread=3.0))
    (fold,) = quick_probe(task, rows, "logreg", 0)
    x = {name: split.x.numpy() for name, split in rows.items()}
    y = {name: split.target.numpy().argmax(1) for name, split in rows.items()}
    mean, deviation = x["train"].mean(0), x["train"].std(0)
    x = {name: (found - mean) / deviation for name, found in x.items()}
    fits = {c: LogisticRegression(C=c).fit(x["train"], y["train"]) for c in STRENGTHS}
    validated = {c: fit.score(x["valid"], y["valid"]) for c, fit in fits.items()}
    best = max(validated, key=validated.get)
    assert fold.details == {"grid_point": {"C": best}, "validation_score": pytest.approx(validated[best])}
    assert fold.prediction == pytest.approx(fits[best].predict_proba(x["test"]), abs=1e-3)
    monkeypatch.setattr("hear_ssam.evaluation.quick.MOST_TO_CHOOSE", 30)  # chosen with a few rows, fitted to all
    (fold,) = quick_probe(task, rows, "logreg", 0)
    expected = fits[fold.details["grid_point"]["C"]].predict_proba(x["test"])
    assert fold.prediction == pytest.approx(expected, abs=1e-3)
    (fold,) = quick_probe(task, rows, "fewshot4", 3)  # rows as they are
    few = draw(rows["train"].target.numpy(), 4, 3)
    model = LogisticRegression().fit(rows["train"].x.numpy()[few], y["train"][few])
    assert fold.prediction == pytest.approx(model.predict_proba(rows["test"].x.numpy()), abs=1e-3)


@pytest.mark.parametrize("count", [1, 5])
def test_the_nearest_neighbours_vote_by_their_cosine(tmp_path, monkeypatch, count):
    monkeypatch.setattr("hear_ssam.evaluation.quick.NEIGHBOURS", (count,))
    task, rows = open_embeddings(noise(tmp_path / "task", spread=2.0))
    (fold,) = quick_probe(task, rows, "knn", 0)
    train = rows["train"].x.numpy()
    unit = [(part - train.mean(0)) / train.std(0) for part in (train, rows["test"].x.numpy())]
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in unit]
    cosine = unit[1] @ unit[0].T
    near = np.argsort(-cosine)[:, :count]
    votes = np.take_along_axis(cosine, near, 1)[..., None]
    expected = (votes * rows["train"].target.numpy()[near]).sum(1) / votes.sum(1)
    assert fold.prediction == pytest.approx(expected, abs=1e-4)


def test_what_validates_to_no_number_is_not_chosen(tmp_path, monkeypatch):
    """d′ where one class is separated and another the wrong way round, say."""
    odd = Score(lambda prediction, target: np.nan if set(prediction.ravel()) <= {0, 1} else 0.5)
    monkeypatch.setitem(SCORES, "top1_acc", odd)
    (fold,) = quick_probe(*open_embeddings(noise(tmp_path / "task", spread=2.0)), "knn", 0)
    assert fold.details["grid_point"]["neighbours"] > 1


def test_few_clips_of_each_class():
    target = np.eye(4, dtype=np.float32)[[0] * 50 + [1] * 50 + [2] * 3 + [3] * 8]
    drawn = draw(target, 8, 0)
    assert target[drawn].sum(0).tolist() == [8, 8, 3, 8] and len(set(drawn)) == len(drawn)
    assert drawn.tolist() == draw(target, 8, 0).tolist() != draw(target, 8, 1).tolist()
    several = (np.random.default_rng(0).random((200, 5)) < 0.3).astype(np.float32)
    assert (several[draw(several, 8, 0)].sum(0) >= 8).all()
    seldom = np.array([[1, 0]] * 50 + [[1, 1]] * 3, np.float32)  # there is enough of the first class, not of the second
    assert seldom[draw(seldom, 3, 0)].sum(0)[1] == 3


def test_same_records_tables_and_intervals_as_heads(tmp_path, run, capsys):
    write_task(tmp_path / "tasks" / "tones")
    write_task(tmp_path / "tasks" / "folds", folds=3)
    write_task(tmp_path / "tasks" / "beeps", embedding_type="event")
    evaluation = run(probe=["exact", *QUICK], shots=2)
    assert not evaluation.failures
    assert "beeps: skipped by knn, logreg, fewshot2: an event task" in capsys.readouterr().err
    headline = [r for r in evaluation.records if r["fold"] is None and r["primary"]]
    seeds = {(r["task"], r["probe"]): [] for r in headline}
    for r in headline:
        seeds[r["task"], r["probe"]].append(r["seed"])
    scenes = {(task, probe): seed for task in ("folds", "tones") for probe, seed in (("knn", [0]), ("logreg", [0]))}
    scenes |= {(task, "fewshot2"): list(range(10)) for task in ("folds", "tones")}
    assert seeds == scenes | {(task, "exact"): [42] for task in ("beeps", "folds", "tones")}
    assert {r["protocol"] for r in headline} == {"heareval"}
    with np.load(predictions_file(tmp_path / "results", next(r for r in headline if r["probe"] == "knn"))) as stored:
        assert "histories" in stored.files and any(name.endswith("/prediction") for name in stored.files)
    text = terminal(evaluation.records)
    assert "probe fewshot2, 10 seeds" in text and " ± " in text and "probe knn, 1 seed" in text
    assert "probe fewshot2" in page(evaluation.records, tmp_path / "results")
    before = read(tmp_path / "results")
    assert run(probe=QUICK, shots=2).records and read(tmp_path / "results") == before  # nothing ran twice


def test_a_class_with_one_clip_is_named_and_taken(tmp_path, run, capsys):
    task = write_task(tmp_path / "tasks" / "tones", clips=9)
    clips = json.loads((task / "train.json").read_text())
    kept = {name: label for name, label in clips.items() if label != ["mid"] or name == "train-2.wav"}
    (task / "train.json").write_text(json.dumps(kept))
    assert shortage(read_task(task), 1) is None
    assert "3 of 3 classes have fewer than 4 clips to train on ('mid': 1)" in shortage(read_task(task), 4)
    evaluation = run(probe="fewshot", shots=3)
    assert "tones: 1 of 3 classes have fewer than 3 clips to train on ('mid': 1)" in capsys.readouterr().err
    assert len({r["seed"] for r in evaluation.records}) == 10 and not evaluation.failures


def test_training_clips_of_a_single_class_are_an_error_of_their_task(tmp_path, run):
    task = write_task(tmp_path / "tasks" / "tones")
    write_task(tmp_path / "tasks" / "sound")
    clips = json.loads((task / "train.json").read_text())
    (task / "train.json").write_text(json.dumps({name: label for name, label in clips.items() if label == ["mid"]}))
    evaluation = run(probe="logreg")
    (failure,) = evaluation.failures.values()
    assert failure.startswith("tones: train has clips of one class alone")
    assert {r["task"] for r in evaluation.records} == {"sound"}


@pytest.mark.parametrize("probe", ["knn", "logreg", "fewshot8"])
def test_a_single_class_among_several_labels(tmp_path, probe):
    """Present or not: a column of predictions; without any label there is nothing to learn."""
    task, rows = open_embeddings(noise(tmp_path / "one", multilabel=True, classes=1))
    (fold,) = quick_probe(task, rows, probe, 0)
    assert fold.prediction.shape == (90, 1) and (fold.scores["mAP"] > 0.75 or "few" in probe)  # all few are of it
    (tmp_path / "one" / "train.target-labels.pkl").write_bytes(pickle.dumps([[]] * 90))
    with pytest.raises(HearSsamError, match="one: train has no labels"):
        quick_probe(*open_embeddings(tmp_path / "one"), probe, 0)


def test_limit_is_marked_everywhere(tmp_path, run, capsys):
    write_task(tmp_path / "tasks" / "tones", clips=30)
    write_task(tmp_path / "tasks" / "small", clips=6)
    whole = run(probe="knn")
    assert {r["task"] for r in whole.records} == {"small", "tones"}
    evaluation = run(probe=["knn", "exact"], limit=9)
    assert {r["task"] for r in evaluation.records} == {"small", "tones-limit9"}  # the small one is whole
    assert {r.get("limit") for r in evaluation.records if r["task"] == "tones-limit9"} == {9}
    assert {r["clips"] for r in evaluation.records if r["task"] == "tones-limit9"} == {27}
    for text in (terminal(evaluation.records), markdown(evaluation.records)):
        assert text.count("-limit9: only 9 clips of each split, no HEAR scores") == 2 and "tones-limit9" in text
    assert "has no clip of" not in capsys.readouterr().err
    assert not run(probe="knn", limit=9).failures


def test_limited_clips_are_spread_over_classes_and_always_the_same(tmp_path):
    task = read_task(write_task(tmp_path / "tones", clips=30))
    few = limited(task, 7, tmp_path / "few")
    for split in task.splits:
        labels = [label for (label,) in few.clips(split).values()]
        assert len(labels) == 7 and {labels.count(label) for label in set(labels)} == {2, 3}
        assert list(few.clips(split)) == [name for name in task.clips(split) if name in few.clips(split)]
        assert few.clips(split) == limited(task, 7, tmp_path / "again").clips(split)
    assert limited(task, 30, tmp_path / "few") is task


def test_estimate_after_the_first_task(tmp_path, run, capsys):
    for name in ("a", "b", "c"):
        write_task(tmp_path / "tasks" / name)
    run(probe=["exact", "knn"])
    err = capsys.readouterr().err
    assert "more for the embeddings of 36 s of audio, then" in err and err.count("estimate:") == 1
    task = read_task(tmp_path / "tasks" / "a")
    assert audio_seconds(task) == 18
    assert probe_seconds(task, 2000, 8) > 1.5 * probe_seconds(task, 1000, 8) > 0


def test_how_probes_agree():
    def record(task, model, probe, score):
        key = {"model": model, "checkpoint_sha256": "", "task": task, "version": "1", "protocol": "heareval", "seed": 0}
        return {**key, "probe": probe, "fold": None, "metric": "mAP", "score": score, "primary": True, "maximize": True}

    scores = {("t1", m): i / 10 for i, m in enumerate("abcd")} | {("t2", m): (3 - i) / 10 for i, m in enumerate("abcd")}
    records = [record(t, m, "exact", s) for (t, m), s in scores.items()]
    records += [record(t, m, "knn", s**2 if t == "t1" else 1 - s) for (t, m), s in scores.items()]
    _, row = agreement(records)
    assert row == ["exact (heareval)", "knn (heareval)", "0.00 (2 tasks)", "–"]  # +1 and −1; two tasks are too few
    assert "0.00 (2 tasks)" in terminal(records) and "| 0.00 (2 tasks) |" in markdown(records)
    assert "How the probes agree" in page(records, Path("nowhere"))
    assert agreement([r for r in records if r["probe"] == "knn"]) == []
    for models, expected in (("abc", [["0.00 (2 tasks)", "–"]]), ("ab", [])):  # three models, then two, of a task
        assert [row[2:] for row in agreement([r for r in records if r["model"] in models])[1:]] == expected


def test_command(tmp_path, serial, capsys):
    write_task(tmp_path / "tasks" / "tones", clips=9)
    command = ["evaluate", MODULE, "--tasks-dir", str(tmp_path / "tasks"), "--results-dir", str(tmp_path / "results")]
    assert cli.main([*command, "--workers", "1", "--probe", "knn", "logreg", "--limit", "6"]) == 0
    out = capsys.readouterr().out
    assert "probe knn" in out and "probe logreg" in out and "tones-limit6" in out
    for option in ("--shots", "--limit"):
        assert cli.main([*command, option, "0"]) == 2
        assert f"{option} must be at least 1" in capsys.readouterr().err

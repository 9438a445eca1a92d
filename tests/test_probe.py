"""The exact probe: heareval's grid, order, early stopping and numbers."""

import csv
import dataclasses
import itertools
import json
import math
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from sklearn.model_selection import ParameterGrid

from benchmarks import probes as benchmark
from hear_ssam import HearSsamError
from hear_ssam.evaluation import probe, tasks
from hear_ssam.evaluation.probe import (
    PROTOCOLS,
    HeadConfig,
    batches,
    grid_points,
    run_probe,
    train_head,
)
from hear_ssam.evaluation.rows import open_embeddings, read_labels, read_rows
from hear_ssam.evaluation.tasks import read_task

DIGITS = "spoken_digit__default_t1_torch2.13.0"
TONES = "multitone__default_t1_torch1.13.1"
EVENTS = "toneevents__default_gp2_t1_torch1.13.1"


def logged_checks(folder, training):
    with open(folder / f"metrics_version_{training}.csv") as file:
        return [row for row in csv.DictReader(file) if row["val_loss"]]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_embeddings(folder, splits, *, dim=4, rows=30, labels=("a", "b", "c"), **metadata):
    """A folder in heareval's layout with separable classes."""
    folder.mkdir()
    metadata = {
        "task_name": "toy",
        "embedding_type": "scene",
        "prediction_type": "multiclass",
        "split_mode": "trainvaltest" if "train" in splits else "presplit_kfold",
        "splits": splits,
        "evaluation": ["top1_acc", "mAP"],
        "evaluation_params": {"task_specific_param_grid": {"hidden_dim": [8], "max_epochs": [12]}},
        **metadata,
    }
    (folder / "task_metadata.json").write_text(json.dumps(metadata))
    vocabulary = "".join(f"{index},{label}\n" for index, label in enumerate(labels))
    (folder / "labelvocabulary.csv").write_text("idx,label\n" + vocabulary)
    generator = np.random.default_rng(1)
    centres = generator.normal(0, 2, (len(labels), dim))
    for split in splits:
        ids = generator.integers(0, len(labels), rows)
        x = (centres[ids] + generator.normal(0, 1, (rows, dim))).astype(np.float32)
        x.tofile(folder / f"{split}.embeddings.npy")
        (folder / f"{split}.embedding-dimensions.json").write_text(json.dumps(x.shape))
        (folder / f"{split}.target-labels.pkl").write_bytes(pickle.dumps([[labels[i]] for i in ids]))
        (folder / f"{split}.json").write_text(json.dumps({f"{n}.wav": [labels[i]] for n, i in enumerate(ids)}))
    return folder


# ---- grid


def test_heareval_tries_the_same_eight_points_in_every_task():
    points = [(p.hidden_layers, p.initialization[7], p.lr) for p in grid_points(PROTOCOLS["heareval"], {}, 42)]
    assert points == [
        (1, "n", 1e-4), (2, "u", 1e-3), (1, "n", 1e-3), (1, "n", 3.2e-4),
        (2, "n", 3.2e-4), (2, "u", 3.2e-4), (2, "n", 3.2e-3), (2, "u", 3.2e-3),
    ]  # fmt: skip


def test_ssam_tries_two_dropouts_with_ten_seeds():
    protocol = PROTOCOLS["ssam"]
    for seed in range(10):
        points = grid_points(protocol, {}, seed)
        assert {(p.hidden_layers, p.initialization, p.lr, p.dropout) for p in points} == {
            (1, "xavier_normal", 1e-4, 0.1),
            (1, "xavier_normal", 1e-4, 0.25),
        }
    assert (protocol.first_seed, protocol.seeds) == (0, 10)


def test_tasks_may_change_the_grid():
    points = grid_points(PROTOCOLS["heareval"], {"task_name": "dcase2016_task2"}, 42)
    assert {p.check_val_every_n_epoch for p in points} == {10}
    metadata = {"evaluation_params": {"task_specific_param_grid": {"max_epochs": [50]}}}
    assert {p.max_epochs for p in grid_points(PROTOCOLS["ssam"], metadata, 0)} == {50}
    several = {"hidden_dim": [8, 16], "dropout": [0.1, 0.5]}
    metadata = {"evaluation_params": {"task_specific_param_grid": several}}
    expected = list(ParameterGrid({**PROTOCOLS["heareval"].grid, **several}))  # with which heareval makes it
    random.Random(7).shuffle(expected)
    assert grid_points(PROTOCOLS["heareval"], metadata, 7) == [HeadConfig(**point) for point in expected[:8]]
    assert tasks._HEAD.keys() == {setting.name for setting in dataclasses.fields(HeadConfig)}  # all are checked


# ---- data


@pytest.mark.parametrize(("sizes", "size"), [((10,), 4), ((3, 5, 1), 4), ((9,), 4), ((4, 4), 4), ((1,), 4), ((5,), 2)])
def test_batches_cut_all_rows_in_order(sizes, size):
    parts = [part.clone() for part in torch.arange(sum(sizes) * 2.0).view(-1, 2).split(sizes)]
    cut = batches(parts, size)
    assert torch.equal(torch.cat(cut), torch.cat(parts))
    assert all(len(batch) == size for batch in cut[:-1]) and 1 <= len(cut[-1]) <= size
    merged = batches(parts, size, merge_single=True)
    assert torch.equal(torch.cat(merged), torch.cat(parts))
    *lengths, last = map(len, cut)
    assert [*map(len, merged)] == ([*lengths, last] if last > 1 or not lengths else [*lengths[:-1], size + 1])


def test_a_last_batch_of_one_row_trains(tmp_path):
    folder = write_embeddings(tmp_path / "toy", ["train", "valid", "test"], rows=9)
    task = read_task(folder)
    splits = {name: read_rows(task, name) for name in task.splits}
    trained = train_head(task, splits, task.data_splits[0], HeadConfig(hidden_dim=8, batch_size=4, max_epochs=3))
    assert trained.epoch == 2


def test_a_hostile_label_pickle_is_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "train.target-labels.pkl"
    path.write_bytes(pickle.dumps([[Hostile()]]))
    with pytest.raises(HearSsamError, match=r"train\.target-labels\.pkl.*mkdir"):
        read_labels(path)
    assert not (tmp_path / "executed").exists()
    path.write_bytes(b"\x80\x04]")
    with pytest.raises(HearSsamError, match="not a readable pickle"):
        read_labels(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(HearSsamError, match="must hold a list"):
        read_labels(path)


def test_damaged_embedding_folders_are_named(tmp_path):
    folder = write_embeddings(tmp_path / "toy", ["train", "valid", "test"], rows=4100)
    x = np.fromfile(folder / "valid.embeddings.npy", np.float32)
    names = dict(read_task(folder).shuffled_clips())["valid"]
    for row in (4099, 7, 0):
        x[4 * row] = np.nan
        x.tofile(folder / "valid.embeddings.npy")
        with pytest.raises(HearSsamError, match=rf"valid\.embeddings\.npy: row {row} \({names[row]}\) is not finite"):
            run_probe(folder, "ssam", 0)
    with open(folder / "valid.embeddings.npy", "wb") as file:
        np.save(file, np.zeros_like(x))  # with a header, which would shift every row
    for _ in range(2):
        with pytest.raises(HearSsamError, match=r"valid\.embeddings\.npy: does not have the size .* bytes, .*again"):
            run_probe(folder, "ssam", 0)
        x[:50].tofile(folder / "valid.embeddings.npy")
    (folder / "valid.embeddings.npy").unlink()
    with pytest.raises(HearSsamError, match=r"valid\.embeddings\.npy: cannot be read"):
        run_probe(folder, "ssam", 0)
    np.zeros((4100, 5), np.float32).tofile(folder / "valid.embeddings.npy")
    (folder / "valid.embedding-dimensions.json").write_text("[4100, 5]")
    with pytest.raises(HearSsamError, match=r"toy: the splits have embeddings of different sizes \[4, 5\]"):
        run_probe(folder, "ssam", 0)
    with pytest.raises(HearSsamError, match="Did you mean 'ssam'"):
        run_probe(write_embeddings(tmp_path / "other", ["train", "valid", "test"]), "sam", 0)


def test_times_of_other_embeddings_are_named(golden, tmp_path):
    folder = shutil.copytree(golden / "heareval" / EVENTS, tmp_path / "events", copy_function=shutil.copy)
    path = folder / "test.filename-timestamps.json"
    stamped = json.loads(path.read_text())
    for wrong in (stamped[1:], [["other.wav", 0.0], *stamped[1:]]):
        path.write_text(json.dumps(wrong))
        with pytest.raises(HearSsamError, match=r"test\.filename-timestamps\.json: does not fit the embeddings"):
            _ = read_rows(read_task(folder), "test").judge


# ---- heads


def test_runs_repeat_and_leave_the_random_state_alone(tmp_path, one_thread):
    folder = write_embeddings(tmp_path / "toy", ["fold02", "fold00", "fold01", "fold03"])
    state = torch.get_rng_state()
    once, again, other = (run_probe(folder, "heareval", seed) for seed in (42, 42, 43))
    assert torch.equal(torch.get_rng_state(), state)
    assert once.histories == again.histories != other.histories
    assert [fold.fold for fold in once.folds] == ["fold00", "fold01", "fold02", "fold03"]
    assert len(once.histories) == 8 + 3
    for fold in once.folds:
        assert fold.prediction.sum(1) == pytest.approx(np.ones(30))
        assert fold.scores["top1_acc"] == np.mean(fold.prediction.argmax(1) == fold.target.argmax(1))


def test_the_winner_is_the_first_best_and_its_best_epoch_is_tested(tmp_path):
    result = run_probe(write_embeddings(tmp_path / "toy", ["train", "valid", "test"]), "heareval", 42)
    best = [max(check["val_score"] for check in history) for history in result.histories]
    winner = result.histories[best.index(max(best))]
    (fold,) = result.folds
    assert fold.details["validation_score"] == max(best)
    assert fold.details["epoch"] == next(check["epoch"] for check in winner if check["val_score"] == max(best))


def test_training_stops_after_patience_checks_without_improvement(tmp_path):
    folder = write_embeddings(tmp_path / "toy", ["train", "valid", "test"])
    task = read_task(folder)
    splits = {name: read_rows(task, name) for name in task.splits}
    config = HeadConfig(hidden_dim=8, patience=4, lr=1e-2)
    trained = train_head(task, splits, task.data_splits[0], config)
    checks = [check["epoch"] for check in trained.history]
    assert checks == list(range(2, checks[-1] + 1, 3)) and checks[-1] == trained.epoch + 3 * 4


def test_selection_by_loss(tmp_path):
    folder = write_embeddings(tmp_path / "toy", ["train", "valid", "test"], use_scoring_for_early_stopping=False)
    result = run_probe(folder, "ssam", 0)
    assert result.folds[0].details["validation_score"] == min(c["val_loss"] for h in result.histories for c in h)


def test_a_head_that_breaks_is_ended_and_loses(tmp_path):
    grid = {"task_specific_param_grid": {"hidden_dim": [8], "max_epochs": [30], "lr": [1e37, 1e-2]}}
    named = {"use_scoring_for_early_stopping": False, "evaluation_params": grid}
    result = run_probe(write_embeddings(tmp_path / "toy", ["train", "valid", "test"], **named), "ssam", 0)
    losses = [[check["val_loss"] for check in history] for history in result.histories]
    assert sorted(len(own) < 10 and not math.isfinite(own[-1]) for own in losses) == [False, False, True, True]
    assert all(math.isfinite(loss) for own in losses for loss in own[:-1]) and result.config.lr == 1e-2


def test_initial_weights_and_first_epochs_equal_heareval(golden, one_thread):
    """Losses agree to rounding: equal torch and thread count, but perhaps another CPU than the golden run's."""
    folder = golden / "heareval" / DIGITS
    task = read_task(folder)
    splits = {name: read_rows(task, name) for name in task.splits}
    point, *_ = grid_points(PROTOCOLS["heareval"], task.metadata, 42)
    torch.manual_seed(42)
    trained = train_head(task, splits, task.data_splits[0], point)
    rows = logged_checks(folder, 0)
    assert [check["epoch"] for check in trained.history[:10]] == [int(row["epoch"]) for row in rows[:10]]
    for check, row in itertools.islice(zip(trained.history, rows, strict=False), 10):
        assert check["val_loss"] == pytest.approx(float(row["val_loss"]), rel=5e-3)
        assert check["val_score"] == pytest.approx(float(row["val_score"]), abs=0.051)  # one clip of 20


@pytest.mark.slow
def test_an_event_task_equals_heareval(golden, one_thread, monkeypatch):
    """The fixture's torch drew other dropout masks; both choose the same heads and hear the same events."""
    folder = golden / "heareval" / EVENTS
    monkeypatch.setitem(PROTOCOLS, "two", dataclasses.replace(PROTOCOLS["heareval"], grid_points=2))
    expected = json.loads((folder / "test.predicted-scores.json").read_text())["test"]
    (fold,) = run_probe(folder, "two", 42).folds
    for name, score in fold.scores.items():
        assert score == pytest.approx(expected[f"test_{name}"], abs=0.03)


@pytest.mark.slow
def test_a_whole_run_equals_heareval(golden, one_thread):
    folder = golden / "heareval" / DIGITS
    expected = json.loads((folder / "test.predicted-scores.json").read_text())
    result = run_probe(folder, "heareval", 42)
    assert result.config.lr == expected["hparams"]["lr"]
    assert result.config.hidden_layers == expected["hparams"]["hidden_layers"]
    for fold in result.folds:
        assert fold.details["epoch"] == expected[fold.fold]["epoch"]
        assert fold.details["loss"] == pytest.approx(expected[fold.fold]["test_loss"], rel=5e-3)
        assert fold.scores["top1_acc"] == pytest.approx(expected[fold.fold]["test_score"], abs=0.051)


def test_multilabel_head_reaches_heareval(golden, tmp_path, one_thread):
    """Another torch drew other dropout masks, so scores agree as those of two seeds do."""
    folder = shutil.copytree(golden / "heareval" / TONES, tmp_path / "tones", copy_function=shutil.copy)
    expected = json.loads((folder / "test.predicted-scores.json").read_text())
    task = read_task(folder)
    splits = {name: read_rows(task, name) for name in task.splits}
    config = HeadConfig(2, initialization="xavier_uniform", lr=3.2e-3)
    torch.manual_seed(0)
    trained = train_head(task, splits, task.data_splits[0], config)
    assert trained.validation_score == pytest.approx(expected["test"]["validation_score"], abs=0.02)


def test_a_single_row_to_train_on_is_refused(tmp_path):
    folder = write_embeddings(tmp_path / "toy", ["train", "valid", "test"], rows=1)
    with pytest.raises(HearSsamError, match="toy: train has a single row to train on"):
        run_probe(folder, "ssam", 0)
    assert len(open_embeddings(write_embeddings(tmp_path / "two", ["train", "valid", "test"], rows=2))[1]["train"]) == 2


def test_torchs_settings_change_nothing(tmp_path):
    """Neither default dtype, threads, deterministic mode nor what the caller does with gradients; all stay as set."""
    folder = write_embeddings(tmp_path / "toy", ["train", "valid", "test"], rows=500, dim=200)
    threads, expected = torch.get_num_threads(), run_probe(folder, "ssam", 0)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(3)
        torch.use_deterministic_algorithms(True)
        with torch.inference_mode(), torch.autocast("cpu"):
            found = run_probe(folder, "ssam", 0)
        assert torch.get_default_dtype() == torch.float64 and torch.get_num_threads() == 3
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    assert found.histories == expected.histories
    np.testing.assert_array_equal(found.folds[0].prediction, expected.folds[0].prediction)


# ---- products in bfloat16


def test_bf16_repeats_and_agrees_with_the_exact_probe(tmp_path, one_thread):
    grid = {"task_specific_param_grid": {"hidden_dim": [256], "max_epochs": [60], "lr": [1e-2]}}
    folder = write_embeddings(tmp_path / "toy", ["fold00", "fold01", "fold02"], rows=60, evaluation_params=grid)
    state = torch.get_rng_state()
    once, again = (run_probe(folder, "ssam", 0, bf16=True) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    exact = run_probe(folder, "ssam", 0)
    assert once.histories == again.histories != exact.histories
    assert [fold.fold for fold in once.folds] == [fold.fold for fold in exact.folds]
    mean, expected = (np.mean([fold.scores["top1_acc"] for fold in result.folds]) for result in (once, exact))
    assert mean == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_bf16_products_are_the_same_with_and_without_instructions(monkeypatch, bias):
    """Outputs and gradients; the order of the sums may turn a last rounding."""
    found = []
    for features in (frozenset(), frozenset({"avx512_bf16"})):
        monkeypatch.setattr(probe, "cpu", lambda features=features: ("CPU", features))
        torch.manual_seed(0)
        layer, x = torch.nn.Linear(300, 40), torch.randn(64, 300, requires_grad=True)
        torch.nn.init.constant_(layer.bias, bias)
        y = probe.bf16_linear(layer, x)
        y.backward(torch.randn(y.shape).bfloat16())
        assert y.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
        exact = x.double() @ layer.weight.double().T + layer.bias.double()
        assert 1e-4 < (y - exact).abs().max() < 0.05  # rounded, and to nothing worse than bfloat16
        found.append([y.detach().float(), x.grad, layer.weight.grad, layer.bias.grad])
    for emulated, native in zip(*found, strict=True):
        torch.testing.assert_close(emulated, native, rtol=1 / 64, atol=1e-2)
        assert (emulated != native).float().mean() < 0.02


@pytest.mark.parametrize("p", [0.0, 0.1, 0.25])
def test_bf16_dropout_keeps_the_share_that_it_is_asked_for(p):
    torch.manual_seed(0)
    y = probe.bf16_dropout(torch.nn.Dropout(p), torch.full((301, 1001), 2.0).bfloat16()).float()
    kept = y != 0
    assert kept.float().mean() == pytest.approx(1 - p, abs=5 * (p / 301e3) ** 0.5 + 1e-9)
    assert kept.float().mean(0).min() > 0.6 * (1 - p)  # wherever a number lies in the 64 bits that are drawn
    for lane in range(4):
        assert kept.view(-1)[lane::4].float().mean() == pytest.approx(1 - p, abs=0.01)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 2 / (1 - p)), rtol=1 / 128, atol=0)


def test_the_benchmark_shows_both_probes_side_by_side(tmp_path, capsys):
    (tmp_path / "embeddings").mkdir()
    folder = write_embeddings(tmp_path / "embeddings" / "toy", ["fold00", "fold01", "fold02"])
    (folder / ".done.embeddings").touch()
    options = ["--embeddings-dir", str(tmp_path / "embeddings"), "--seeds", "2", "--workers", "1"]
    assert benchmark.main([*options, "--results-dir", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out.splitlines()[2:]
    assert [cell.strip() for cell in table[0].split("|")[1:4]] == ["task", "exact", "bf16"]
    assert len({line.count("|") for line in table}) == 1 and table[2].startswith("| toy | ")


@pytest.mark.parametrize(("layers", "offset"), [(0, 1000.0), (1, 0.0), (1, 1000.0), (2, 0.0)])
def test_bf16_learns_what_the_exact_probe_learns(tmp_path, one_thread, layers, offset):
    """Without dropout both take the same steps but for rounding, however far from 0 the rows lie."""
    folder = write_embeddings(tmp_path / "toy", ["train", "valid", "test"], rows=60, dim=20)
    for path in folder.glob("*.embeddings.npy"):
        (np.fromfile(path, np.float32) + np.float32(offset)).tofile(path)
    task = read_task(folder)
    splits = {name: read_rows(task, name) for name in task.splits}
    config = HeadConfig(layers, hidden_dim=64, dropout=0.0, max_epochs=9, check_val_every_n_epoch=1)
    heads = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", enabled=False):  # as run_probe calls it
            heads.append(train_head(task, splits, task.data_splits[0], config, bf16=bf16))
    exact, half = heads
    assert [check["val_loss"] for check in half.history] == pytest.approx(
        [check["val_loss"] for check in exact.history], rel=0.05
    )
    with torch.no_grad():  # the heads take the same rows, as they are on disk
        x = splits["test"].x
        found, wanted = (trained.head.eval()(x).softmax(1) for trained in heads)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.05)

"""The demo: its task, its picture, and the command on a thinned copy of the task."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import soundfile

from hear_ssam import demo
from hear_ssam.cli import main
from hear_ssam.errors import HearSsamError
from hear_ssam.evaluation.tasks import read_task
from hear_ssam.paths import shipped
from hear_ssam.pretraining.corpus import recipe as corpus_recipe

TASK = shipped("eval_tasks") / "demo" / "tasks" / demo.TASK
FREE = ("CC0 1.0", "public domain", "CC BY", "CC BY 3.0", "CC BY 4.0")


def test_task_is_whole() -> None:
    task = read_task(TASK)
    seen: set[bytes] = set()
    for fold in task.splits:
        clips = task.clips(fold)
        assert {label for labels in clips.values() for label in labels} == set(task.labels)
        assert sorted(clips) == sorted(path.name for path in (TASK / "16000" / fold).iterdir())
        for name in clips:
            audio, rate = soundfile.read(TASK / "16000" / fold / name, dtype="float32")
            assert (rate, audio.shape) == (16_000, (32_000,))
            assert 0.01 < np.abs(audio).max() < 1.5
            seen.add(audio.tobytes())
    assert len(seen) == sum(len(task.clips(fold)) for fold in task.splits) > 625  # standard error below 2 points
    assert sum(path.stat().st_size for path in TASK.rglob("*") if path.is_file()) < 6_000_000


def test_every_clip_is_credited_free_and_in_one_fold_with_its_recording() -> None:
    task = read_task(TASK)
    rows = list(csv.DictReader((TASK / "sources.csv").read_text(encoding="utf-8").splitlines()))
    assert sorted(row["clip"] for row in rows) == sorted(name for fold in task.splits for name in task.clips(fold))
    folds: dict[str, set[str]] = {}
    for row in rows:
        assert row["licence"] in FREE and row["author"] and row["origin"].startswith("http")
        assert task.clips(row["fold"])[row["clip"]] == [row["label"]]
        folds.setdefault(row["source"] + row["file"], set()).add(row["fold"])
        if re.search(r"/(sounds|s)/\d+", row["origin"]):  # one recording on Freesound may have given several files
            folds.setdefault(row["label"] + row["origin"], set()).add(row["fold"])
    assert all(len(where) == 1 for where in folds.values())


def test_pretraining_leaves_the_task_out() -> None:
    rows = list(csv.DictReader((TASK / "sources.csv").read_text(encoding="utf-8").splitlines()))
    recipe = corpus_recipe()
    wanted = {entry["name"]: entry["files"] for entry in recipe["package"]}
    left_out = {name.split(":")[0] for entry in recipe["left_out"] for name in entry["names"]}
    for row in rows:  # only gcin-voice is in both, with another voice
        assert row["source"] in left_out
        assert not any(Path(row["file"]).match(pattern) for pattern in wanted.get(row["source"], []))
        assert all(entry["repository"] != f"https://github.com/{row['source']}" for entry in recipe["source"])


def test_make_cuts_the_clips_again_and_names_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("make", TASK.parent.parent / "make.py")
    assert spec and spec.loader
    spec.loader.exec_module(make := importlib.util.module_from_spec(spec))
    every = csv.DictReader((TASK / "sources.csv").read_text(encoding="utf-8").splitlines())
    rows = list({row["fold"]: row for row in every}.values())
    with open(tmp_path / "sources.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(make, "TASK", tmp_path)
    with pytest.raises(SystemExit, match=rows[0]["source"]):
        make.main(tmp_path)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 60 * 16_000)
    for row in rows:
        (path := tmp_path / row["source"] / row["file"]).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise, 16_000, format="WAV")
    make.main(tmp_path)
    for row in rows:
        assert json.loads((tmp_path / f"{row['fold']}.json").read_text())[row["clip"]] == [row["label"]]
        audio, rate = soundfile.read(tmp_path / "16000" / row["fold"] / row["clip"])
        start = round(float(row["start"]) * rate)
        assert np.corrcoef(audio, noise[start : start + 2 * rate])[0, 1] > 0.5
    assert read_task(tmp_path).labels == tuple(sorted({row["label"] for row in rows}))


def test_recording_is_joined_in_order() -> None:
    task = read_task(TASK)
    audio = demo.read_recording(task, demo.RECORDING)
    assert audio.shape == (3 * 32_000,)
    second, _ = soundfile.read(next(TASK.glob(f"16000/*/{demo.RECORDING}-1.ogg")), dtype="float32")
    np.testing.assert_array_equal(audio[32_000:64_000], second)
    with pytest.raises(HearSsamError, match="no clip of nothing"):
        demo.read_recording(task, "nothing")


@pytest.fixture
def thin_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three folds, one clip of each class (and the recording of the picture), a probe of a few epochs."""
    folder = tmp_path / "demo" / "tasks" / demo.TASK
    folder.mkdir(parents=True)
    shutil.copy(TASK / "labelvocabulary.csv", folder)
    metadata = json.loads((TASK / "task_metadata.json").read_text())
    metadata["splits"] = metadata["splits"][:3]
    few = {"hidden_layers": [1], "initialization": ["xavier_uniform"], "lr": [1e-3], "max_epochs": [30]}
    metadata["evaluation_params"] = {"task_specific_param_grid": few}
    (folder / "task_metadata.json").write_text(json.dumps(metadata))
    for fold in metadata["splits"]:
        clips = json.loads((TASK / f"{fold}.json").read_text())
        kept = {labels[0]: name for name, labels in clips.items()}
        names = {*kept.values(), *(name for name in clips if name.startswith(demo.RECORDING))}
        (folder / f"{fold}.json").write_text(json.dumps({name: clips[name] for name in sorted(names)}))
        (folder / "16000" / fold).mkdir(parents=True)
        for name in names:
            shutil.copy(TASK / "16000" / fold / name, folder / "16000" / fold)
    monkeypatch.setattr(demo, "shipped", lambda name: tmp_path)
    return folder


def test_demo_end_to_end(thin_task: Path, tmp_path: Path) -> None:
    settings = dict(matplotlib.rcParams)
    untrained = {"model": "ssam_tiny", "pretrained": False}
    table, picture = demo.run_demo(tmp_path / "out", untrained, ["logreg", "exact"])
    assert all(word in table for word in ("logmel", "ssam_tiny", "top1_acc", "probe logreg", "probe exact"))
    height, width, _ = matplotlib.image.imread(picture).shape
    assert (width, height) == (2025, 930)
    assert dict(matplotlib.rcParams) == settings
    records = (tmp_path / "out" / "results" / "records.jsonl").read_bytes()
    again, _ = demo.run_demo(tmp_path / "out", untrained, ["logreg", "exact"])
    assert again == table
    assert (tmp_path / "out" / "results" / "records.jsonl").read_bytes() == records  # nothing ran twice


def test_command_names_what_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "out")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err

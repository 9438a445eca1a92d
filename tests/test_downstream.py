"""From embeddings to answers: classify, search, map, HearEmbedder."""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from scipy.stats import t

import hear_ssam
from hear_ssam import HearSsamError, cli
from hear_ssam.audio import read_audio
from hear_ssam.downstream import classify, map
from hear_ssam.downstream.labels import read_labels
from hear_ssam.downstream.table import read_embeddings

RATE = 16_000
CLASSES = {"high": 3000.0, "low": 300.0, "noise": 0.0}


@pytest.fixture(autouse=True)
def same_thread_count() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def sound(label: str, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    time = np.arange(random.integers(9_000, 20_000)) / RATE
    tone = np.sin(2 * np.pi * CLASSES[label] * random.uniform(0.9, 1.1) * time)
    return (0.2 * tone if CLASSES[label] else 0.1 * random.standard_normal(len(time))).astype(np.float32)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    for label in CLASSES:
        (folder / label).mkdir()
        for seed in range(6):
            soundfile.write(folder / label / f"{seed}.wav", sound(label, seed), RATE)
    return folder


@pytest.fixture(scope="module")
def classifier(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("classifier") / "sounds.json"
    assert cli.main(["classify", "train", str(sounds), "-o", str(file), "--model", "logmel"]) == 0
    return file


@pytest.fixture(scope="module")
def embeddings(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("embeddings") / "all.parquet"
    assert cli.main(["embed", str(sounds), "-o", str(file), "--model", "logmel", "--kind", "scene"]) == 0
    return file


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


# ------------------------------------------------------------------------------------------------------------ classify


def test_train_shows_scores_and_predict_says_the_same(
    sounds: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = classify.describe(json.loads(classifier.read_text()))
    assert "3 classes, 18 clips" in text and "by the fit to the others; 95 % intervals" in text
    assert re.search(r"1  high +6 +1\.00 \[0\.61, 1\.00\] +1\.00", text)
    assert re.search(r"accuracy +18 +1\.00 \[0\.82, 1\.00\]", text)
    assert re.search(r"predicted as +1 +2 +3\n 1  high +6 +\. +\.\n 2  low +\. +6 +\.\n 3  noise +\. +\. +6$", text)
    assert run("classify", "predict", classifier, sounds, "-o", tmp_path / "out.csv") == 0
    found = rows(tmp_path / "out.csv")
    assert list(found[0]) == ["path", "label", "high", "low", "noise"]
    assert [row["path"] for row in found] == [str(file) for file in sorted(sounds.rglob("*.wav"))]
    assert [row["label"] for row in found] == [Path(row["path"]).parent.name for row in found]
    for row in found:
        assert abs(sum(float(row[label]) for label in CLASSES) - 1) < 1e-5
        assert float(row[row["label"]]) > 0.5


def test_the_file_gives_the_probabilities_of_scikit_learn(sounds: Path, classifier: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    files = sorted(sounds.rglob("*.wav"))
    x, stored = hear_ssam.embed(files, "logmel"), classify.read_classifier(classifier)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=stored["C"], max_iter=2000))
    expected = pipeline.fit(x, [file.parent.name for file in files]).predict_proba(x)
    np.testing.assert_allclose(classify.probabilities(stored, x), expected, atol=1e-4)


def test_two_classes(sounds: Path, tmp_path: Path) -> None:
    lines = [f"{sounds / label / f'{seed}.wav'},{label}" for label in ("low", "high") for seed in range(6)]
    (tmp_path / "list.csv").write_text("path,label\n" + "\n".join(lines))
    assert run("classify", "train", tmp_path / "list.csv", "-o", tmp_path / "a.json", "--model", "logmel") == 0
    assert (
        run("classify", "predict", tmp_path / "a.json", sounds / "low", sounds / "high", "-o", tmp_path / "a.csv") == 0
    )
    found = rows(tmp_path / "a.csv")
    assert [row["label"] for row in found] == ["low"] * 6 + ["high"] * 6
    assert all(abs(float(row["low"]) + float(row["high"]) - 1) < 1e-5 for row in found)


def test_windows_are_judged_as_if_cut_out(classifier: Path, tmp_path: Path) -> None:
    joined = np.concatenate([sound("high", 9)[:8000], sound("low", 9)[:8000], sound("noise", 9)[:8000]])
    soundfile.write(tmp_path / "joined.wav", joined, RATE, subtype="FLOAT")
    arguments = classifier, tmp_path / "joined.wav", "-o", tmp_path / "out.csv", "--window", "0.5"
    assert run("classify", "predict", *arguments) == 0
    found = rows(tmp_path / "out.csv")
    assert list(found[0])[:4] == ["path", "start_ms", "end_ms", "label"]
    assert [(row["start_ms"], row["end_ms"]) for row in found] == [("0", "500"), ("500", "1000"), ("1000", "1500")]
    assert [row["label"] for row in found] == ["high", "low", "noise"]
    soundfile.write(tmp_path / "cut.wav", joined[8000:16000], RATE, subtype="FLOAT")
    assert run("classify", "predict", classifier, tmp_path / "cut.wav", "-o", tmp_path / "cut.csv") == 0
    (cut,) = rows(tmp_path / "cut.csv")
    assert all(abs(float(cut[label]) - float(found[1][label])) < 1e-5 for label in CLASSES)
    soundfile.write(tmp_path / "long.wav", np.zeros(1_250_000), 1000)
    arguments = classifier, tmp_path / "long.wav", "-o", tmp_path / "long.csv", "--window", "400.0625"
    assert run("classify", "predict", *arguments) == 0
    times = [(row["start_ms"], row["end_ms"]) for row in rows(tmp_path / "long.csv")]
    assert times[2:] == [("800125", "1200187.5"), ("1200187.5", "1250000")]


def test_from_embeddings_with_labels_splits_and_groups(
    sounds: Path, embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(name: str, split: Any, group: Any) -> Path:
        lines = [
            f"{sounds / label / f'{seed}.wav'},{label},{split(seed)},{group(seed)}"
            for label in CLASSES
            for seed in range(6)
        ]
        (tmp_path / name).write_text("path,label,split,group\n" + "\n".join(lines))
        return tmp_path / name

    tested = write("split.csv", lambda seed: "test" if seed > 3 else "valid" if seed > 2 else "train", lambda seed: "")
    assert run("classify", "train", embeddings, "--labels", tested, "-o", tmp_path / "a.json") == 0
    text = capsys.readouterr().out
    assert "12 clips" in text and "the test split" in text and re.search(r"accuracy +6 ", text)
    (tmp_path / "more.csv").write_text(
        "\n".join([tested.read_text(), f"{tested},other,train,", f"{embeddings},other,train,"])
    )
    assert run("classify", "train", embeddings, "--labels", tmp_path / "more.csv", "-o", tmp_path / "no.json") == 2
    assert "class 'other' has 0 recordings with embeddings to train on" in capsys.readouterr().err
    lines = [line for line in tested.read_text().splitlines() if not line.endswith("test,")]
    (tmp_path / "untested.csv").write_text("\n".join([*lines, f"{tested},low,test,"]))
    assert run("classify", "train", embeddings, "--labels", tmp_path / "untested.csv", "-o", tmp_path / "no.json") == 2
    assert "no recording of its split test has embeddings" in capsys.readouterr().err
    for option, value, text in [
        ("--model", "ssam_tiny", "was made with weights (none) of logmel, not "),
        ("--model-options", '{"seed": 1}', "the embeddings say with which they were made"),
    ]:
        assert run("classify", "train", embeddings, "--labels", tested, "-o", tmp_path / "no.json", option, value) == 2
        assert text in capsys.readouterr().err
    grouped = write("group.csv", lambda seed: "", lambda seed: f"day {seed % 2}")
    assert run("classify", "train", embeddings, "--labels", grouped, "-o", tmp_path / "b.json") == 0
    assert "2 folds" in capsys.readouterr().out


def test_labels_of_embeddings_whose_audio_is_elsewhere(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "far").symlink_to(sounds)
    monkeypatch.chdir(tmp_path)
    assert run("embed", "far/low", "far/high", "-o", "here/e.parquet", "--model", "logmel", "--kind", "scene") == 0
    Path("seen").symlink_to(tmp_path, target_is_directory=True)
    lines = [f"seen/far/{label}/{seed}.wav , {label}" for label in ("low", "high") for seed in range(6)]
    Path("seen.csv").write_text("path, label\n" + "\n".join(lines))
    assert run("classify", "train", "here/e.parquet", "--labels", "seen.csv", "-o", "s.json") == 0
    assert "have no embeddings" not in capsys.readouterr().err
    (tmp_path / "far").unlink()
    names = [f"far/{label}/{seed}.wav" for label in ("low", "high") for seed in range(7)]
    Path("here/list.csv").write_text("path,label\n" + "\n".join(f"{name},{name[4:-6]}" for name in names))
    capsys.readouterr()
    assert run("classify", "train", "here/e.parquet", "--labels", "here/list.csv", "-o", "c.json") == 0
    said = capsys.readouterr()
    assert "2 classes, 12 clips" in said.out
    text = "2 of 14 recordings have no embeddings and are left out"
    assert said.err == f"here/list.csv: {text}, here/far/low/6.wav first\n"
    assert run("map", "here/e.parquet", "--labels", "here/list.csv", "-o", "map.html") == 0
    assert "map.html: 12 clips, 12 of them silent: no files of these names" in capsys.readouterr().out
    assert run("classify", "train", "here/e.parquet", "-o", "d.json") == 2
    assert "here/e.parquet: embeddings have no labels; give them with --labels CSV" in capsys.readouterr().err
    assert run("classify", "train", "here/list.csv", "--labels", "here/list.csv", "-o", "d.json") == 2
    assert "here/list.csv: holds no embeddings" in capsys.readouterr().err
    Path("list.csv").write_text("path,label\nother.wav,a\n")
    assert run("map", "here/e.parquet", "--labels", "list.csv", "-o", "map.html") == 2
    assert "--labels list.csv: names none of the clips" in capsys.readouterr().err


def test_groups_stay_on_one_side() -> None:
    """A class that is told only by its group scores no better than chance."""
    from hear_ssam.downstream.labels import Labelled
    from hear_ssam.downstream.table import Embeddings

    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(24), 10)
    x = random.normal(size=(24, 30))[groups] + 0.01 * random.normal(size=(240, 30))
    labels = [Labelled(f"/{i}", "ab"[g % 2], "", f"{g}") for i, g in enumerate(groups)]
    none = np.full(240, np.nan)
    table = Embeddings([row.path for row in labels], none, none, x.astype(np.float32), {})
    for grouped, low, high in ((True, 0.2, 0.8), (False, 0.99, 1.0)):
        own = labels if grouped else [row._replace(group="") for row in labels]
        found = classify.train([table], own, "x")
        confusion = np.array(found["confusion"])
        assert not grouped or classify.train([table], own, "x") == found  # the folds are drawn alike
        assert low <= confusion.trace() / confusion.sum() <= high


def test_the_interval_is_wilsons() -> None:
    np.testing.assert_allclose(classify.interval(np.arange(10) < 8, np.arange(10)), (0.8, 0.4902, 0.9433), atol=1e-4)
    assert classify.interval(np.zeros(0, bool), np.zeros(0, int)) == (None, 0.0, 1.0)
    sizes, right = np.array([2, 3, 1, 2, 4, 2]), np.array([2, 1, 1, 1, 3, 0])  # of six groups
    count, share = 14, 8 / 14
    variance = 6 / 5 * ((right - share * sizes) ** 2).sum() / count**2
    independent = share * (1 - share) / variance * (t.ppf(0.975, 13) / t.ppf(0.975, 5)) ** 2
    centre = (share + 1.95996**2 / independent / 2) / (1 + 1.95996**2 / independent)
    hits = np.concatenate([np.arange(size) < good for size, good in zip(sizes, right, strict=True)])
    found, low, high = classify.interval(hits, np.repeat(np.arange(6), sizes))
    half = 1.95996 * math.sqrt(share * (1 - share) / independent + 1.95996**2 / independent**2 / 4)
    half /= 1 + 1.95996**2 / independent
    np.testing.assert_allclose((found, low, high), (share, centre - half, centre + half), atol=1e-4)


def test_windows_of_one_recording_are_no_independent_witnesses(sounds: Path, tmp_path: Path) -> None:
    random, covered = np.random.default_rng(1), 0
    for _ in range(200):  # ten recordings of fifty windows, of which some recordings are mostly right, some wrong
        group = np.repeat(np.arange(10), 50)
        hits = random.random(500) < random.beta(4, 1, 10)[group]
        low, high = classify.interval(hits, group)[1:]
        covered += low <= 0.8 <= high
    assert 180 <= covered <= 198  # 95 %; taken for independent, 85
    for groups in (2, 1):  # all right: as two, or one, of them
        hits = (
            classify.interval(np.ones(60, bool), np.arange(60) % groups),
            classify.interval(np.ones(groups), np.arange(groups)),
        )
        assert hits[0] == hits[1]
    lines = [f"{file},{file.parent.name}" for file in sounds.rglob("*.wav")]
    (tmp_path / "list.csv").write_text("path,label\n" + "\n".join(lines))
    windows = "--window", "0.2", "--hop", "0.05", "--model", "logmel"
    assert run("embed", sounds, "-o", tmp_path / "windows", *windows) == 0
    assert (
        run("classify", "train", tmp_path / "windows", "--labels", tmp_path / "list.csv", "-o", tmp_path / "a.json")
        == 0
    )
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["clips"] > 150
    assert found["scores"][-1] == pytest.approx(classify.interval(np.ones(18, bool), np.arange(18)), abs=0.05)


def test_few_groups_that_hold_several_classes() -> None:
    """Every fit sees every class: stratified folds left one of two, a traceback, or one of three, which scored 0."""
    from hear_ssam.downstream.labels import Labelled
    from hear_ssam.downstream.table import Embeddings

    kinds = [("a", "0"), ("a", "2"), ("b", "2"), ("b", "3")]
    labels = [Labelled(f"/{i}", label, "", group) for i, (label, group) in enumerate(kinds)]
    none, x = np.full(4, np.nan), np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], np.float32)
    found = classify.train([Embeddings([row.path for row in labels], none, none, x, {})], labels, "x")
    assert found["confusion"] == [[2, 0], [0, 2]] and found["scored"].startswith("3 folds")


def test_classes_may_be_called_anything(tmp_path: Path) -> None:
    """As a column of the predictions, or by bytes that are not UTF-8."""
    names = ["label", "start_ms", os.fsdecode(b"caf\xe9"), 'a,"\nb']
    for number, name in enumerate(names):
        (tmp_path / "in" / name).mkdir(parents=True)
        for seed in range(2):
            soundfile.write(tmp_path / "tone.wav", sound(["high", "low", "noise"][number % 3], seed), RATE)
            (tmp_path / "tone.wav").rename(tmp_path / "in" / name / f"{seed}.wav")
    file, out = tmp_path / "a.json", tmp_path / "a.csv"
    assert run("classify", "train", tmp_path / "in", "-o", file, "--model", "logmel") == 0
    assert run("classify", "predict", file, tmp_path / "in", "-o", out) == 0
    with open(out, newline="", encoding="utf-8") as lines:
        header, *found = csv.reader(lines)
    assert header == ["path", "label", 'a,"\nb', "caf\ufffd", "label (class)", "start_ms (class)"]
    assert len(found) == 8 and {row[1] for row in found} <= {name.removesuffix(" (class)") for name in header}


def csv_of(text: str) -> Any:
    return lambda folder: (folder / "list.csv").write_text(text) and folder / "list.csv"


def folders(*names: str) -> Any:
    def make(folder: Path) -> Path:
        for name in names:
            (folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / "in" / name, np.zeros(4000), RATE)
        return folder / "in"

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (folders("a.wav"), "in: has no subfolders"),
        (folders("x/a.wav", "x/b.wav"), "in: has one class, 'x'; a classifier needs two"),
        (folders("x/a.wav", "x/b.wav", "y/a.wav"), "in: class 'y' has 1 recordings to train on; it needs two"),
        (folders("x/a.wav", "x/b.wav", "X/a.wav", "X/b.wav"), "in: the labels 'X' and 'x' are the same but for case"),
        (csv_of("path,label\na.wav,x\n"), "list.csv: 1 of 1 files are not there"),
        (csv_of("path,kind\nz.wav,x\n"), "list.csv: has no column label (path, kind)"),
        (csv_of("path,label\nz.wav,\n"), "list.csv: {}/z.wav has no label"),
        (csv_of("path,label,split\n1.wav,a,train\n2.wav,b,dev\n"), "unknown split in"),
        (csv_of("path,label,split\n1.wav,a,train\n2.wav,b,\n"), "list.csv: give every row a split"),
        (csv_of("path,label,split\n1.wav,a,train\n2.wav,b,train\n"), "list.csv: give every row a split"),
        (
            csv_of("path,label,group\n1.wav,a,1\n2.wav,a,1\n3.wav,b,2\nz.wav,b,3\n"),
            "class 'a' has 1 groups to train on",
        ),
        (csv_of("path,label\n1.wav,a\n2.wav,b\n./1.wav,b\n"), "1.wav stands in it twice, as a and b; keep one"),
        (csv_of("path,label,split\n1.wav,a,train\n1.wav,a,test\n"), "twice, as a train and a test; keep one"),
        (folders("caf\u00e9/a.wav", "cafe\u0301/a.wav"), "are the same but for case or Unicode form"),
    ],
)
def test_labels_that_are_no_use(tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, message: str) -> None:
    for name in "123z":
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(4000), RATE)
    assert run("classify", "train", make(tmp_path), "-o", tmp_path / "out.json", "--model", "logmel") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hear-ssam: error: ") and message.replace("{}", str(tmp_path)) in line
    assert not (tmp_path / "out.json").exists()


def test_bad_recordings_are_skipped_and_named(
    sounds: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.wav").write_text("hello")
    inputs = tmp_path / "bad.wav", sounds / "low" / "0.wav"
    assert run("classify", "predict", classifier, *inputs, "-o", tmp_path / "out.csv") == 1
    assert f"skipped {tmp_path / 'bad.wav'}: cannot be read as audio" in capsys.readouterr().err
    assert [row["label"] for row in rows(tmp_path / "out.csv")] == ["low"]
    assert run("classify", "predict", classifier, inputs[0], "-o", tmp_path / "none.csv") == 2
    assert not (tmp_path / "none.csv").exists()


def test_other_weights_and_other_files_are_refused(
    sounds: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = sounds / "low" / "0.wav", ("-o", tmp_path / "out.csv")
    assert run("classify", "predict", classifier, file, *out, "--model", "ssam_tiny") == 2
    assert f"{classifier}: was made with weights (none) of logmel, not " in capsys.readouterr().err
    assert run("classify", "predict", classifier, file, *out, "--window", "1", "--hop", "0") == 2
    assert "--window 1 --hop 0: take seconds" in capsys.readouterr().err
    assert run("classify", "predict", classifier, file, *out, "--hop", "0.5") == 2
    assert "--hop 0.5: of no use without --window" in capsys.readouterr().err
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "odd.json").write_text(json.dumps({**json.loads(classifier.read_text()), "intercept": [1.0]}))
    for wrong in (tmp_path / "no.json", tmp_path / "odd.json", tmp_path / "absent.json", file):
        assert run("classify", "predict", wrong, file, *out) == 2
        assert f"{wrong}: is not a classifier" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


# ------------------------------------------------------------------------------------------------------- search and map


def test_search_finds_the_clip_itself_and_its_kind(
    sounds: Path, embeddings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("search", embeddings, sounds / "low" / "3.wav", "-k", "6") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"1.0000  {sounds / 'low' / '3.wav'}"
    assert len(lines) == 6 and all("/low/" in line for line in lines)
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    table = read_embeddings(embeddings)
    query = hear_ssam.embed(sounds / "low" / "3.wav", "logmel")[0]
    cosine = table.x @ query / np.linalg.norm(table.x, axis=1) / np.linalg.norm(query)
    np.testing.assert_allclose(scores, np.sort(cosine)[::-1][:6], atol=1e-4)


def test_search_in_windows_says_when(sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joined = np.concatenate([sound("high", 9)[:8000], sound("low", 9)[:8000]])
    soundfile.write(tmp_path / "joined.wav", joined, RATE)
    assert run("embed", tmp_path / "joined.wav", "-o", tmp_path / "w", "--model", "logmel", "--window", "0.5") == 0
    capsys.readouterr()
    assert run("search", tmp_path / "w", sounds / "low" / "1.wav", "-k", "1") == 0
    assert f"  0.50-1.00 s  {tmp_path / 'joined.wav'}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["search", "map"])
def test_what_is_no_embeddings(
    sounds: Path, embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    more = [sounds / "low" / "0.wav"] if command == "search" else ["-o", tmp_path / "map.html"]
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.parquet").write_bytes(embeddings.read_bytes())
    options = "--kind", "scene", "-o", tmp_path / "b.parquet", "--model-options", '{"pooling": "mean"}'
    assert run("embed", sounds / "low" / "0.wav", *options) == 0
    (tmp_path / "b.parquet").rename(tmp_path / "mixed" / "b.parquet")
    assert (
        run("embed", sounds / "low" / "0.wav", "-o", tmp_path / "t", "--model", "logmel", "--kind", "timestamps") == 0
    )
    for place, message in [
        (tmp_path / "absent", "holds no embeddings; write them there"),
        (sounds, "holds no embeddings"),
        (tmp_path / "mixed", "holds embeddings with "),
        (tmp_path / "t", "holds timestamp embeddings only"),
    ]:
        capsys.readouterr()
        assert run(command, place, *more) == 2
        assert f"{place}: {message}" in capsys.readouterr().err
    assert not (tmp_path / "map.html").exists()


def test_search_refuses_other_weights(
    sounds: Path, embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = '{"model": "ssam_tiny", "pretrained": false}'
    out = "-o", tmp_path / "random.parquet", "--kind", "scene"
    assert run("embed", sounds / "low" / "0.wav", *out, "--model-options", random) == 0
    assert run("embed", sounds / "low", *out, "--model", "ssam_tiny", "--model-options", '{"pretrained": false}') == 0
    assert ", 1 were there already" in capsys.readouterr().err  # one model, however it is named
    for place, other, message in [
        (embeddings, "ssam_tiny", "was made with weights (none) of logmel, not "),
        (tmp_path / "random.parquet", "ssast_tiny", "of ssam_tiny, not (none) of ssast_tiny"),
    ]:
        assert run("search", place, sounds / "low" / "0.wav", "--model", other) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_the_map_is_one_page_that_loads_nothing(sounds: Path, embeddings: Path, tmp_path: Path, method: str) -> None:
    assert run("map", embeddings, "-o", tmp_path / "map.html", "--method", method) == 0
    text = (tmp_path / "map.html").read_text("utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:|//)|@import|url\(", text)
    data = json.loads(re.search(r"const data = (.*);\n", text)[1])
    assert len(data["points"]) == 18 and set(data["hues"]) == set(CLASSES)
    for x, y, label, name, link in data["points"]:
        assert 0 <= x <= 1 and 0 <= y <= 1 and Path(name).parent.name == label
        assert (tmp_path / link).resolve() == Path(name)
    spread = {label: np.array([p[:2] for p in data["points"] if p[2] == label]) for label in CLASSES}
    centres = {label: points.mean(0) for label, points in spread.items()}
    for label, points in spread.items():
        nearest = [min(centres, key=lambda c: np.linalg.norm(point - centres[c])) for point in points]
        assert nearest.count(label) >= 5


def test_clips_that_are_all_alike_have_a_map_too(sounds: Path, tmp_path: Path) -> None:
    for seed in range(4):
        (tmp_path / f"{seed}.wav").hardlink_to(sounds / "low" / "0.wav")
    assert run("embed", tmp_path, "-o", tmp_path / "e.parquet", "--model", "logmel", "--kind", "scene") == 0
    command = [sys.executable, "-m", "hear_ssam", "map", tmp_path / "e.parquet", "-o", tmp_path / "map.html"]
    done = subprocess.run([*command, "--method", "tsne"], capture_output=True, text=True)  # it crashed Python
    assert (done.returncode, done.stderr) == (0, "")


def test_names_cannot_break_the_page() -> None:
    name = "</script><script>alert(1)</script>\"'&.wav"
    text = map.page([[0.5, 0.5, name, name, ""]] * 3, name)
    assert text.count("<script>") == 1 == text.count("</script>")
    assert json.loads(re.search(r"const data = (.*);\n", text)[1])["points"][0][3] == name


def test_labels_colour_the_map(sounds: Path, embeddings: Path, tmp_path: Path) -> None:
    lines = [f"{file},{'tone' if file.parent.name != 'noise' else 'other'}" for file in sounds.rglob("*.wav")]
    (tmp_path / "list.csv").write_text("path,label\n" + "\n".join(lines))
    assert run("map", embeddings, "-o", tmp_path / "map.html", "--labels", tmp_path / "list.csv") == 0
    assert '"hues": {"other": ' in (tmp_path / "map.html").read_text()


# ------------------------------------------------------------------------------------------------------------ estimator


def test_a_step_of_a_pipeline(sounds: Path) -> None:
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    files = sorted(sounds.rglob("*.wav"))
    labels = [file.parent.name for file in files]
    embedder = hear_ssam.HearEmbedder("logmel")
    pipeline = make_pipeline(embedder, StandardScaler(), LogisticRegression())
    pipeline.fit(files[::2], labels[::2])
    assert pipeline.score(files[1::2], labels[1::2]) == 1.0
    found = embedder.transform(files)
    np.testing.assert_array_equal(found, hear_ssam.embed(files, "logmel"))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(embedder)).transform(files), found)
    np.testing.assert_array_equal(clone(embedder).fit_transform(files), found)
    assert list(embedder.get_feature_names_out()[:2]) == ["hearembedder0", "hearembedder1"] and found.shape == (18, 160)
    arrays = [read_audio(file, RATE) for file in files]
    np.testing.assert_allclose(embedder.transform(arrays), found, atol=1e-6)
    assert embedder.set_params(model="ssam_tiny").transform(files[:1]).shape == (1, 1920)


def test_scikit_learns_own_checks() -> None:
    """All that do not feed it arrays of a handful of features: its features are samples, and 201 make a clip."""
    from sklearn.utils import estimator_checks as checks

    embedder = hear_ssam.HearEmbedder("logmel")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not take such arrays
        assert {result["status"] for result in checks.check_estimator(embedder, on_fail=None)} == {"passed"}
    for name in (
        "parameters_default_constructible", "get_params_invariance", "set_params", "no_attributes_set_in_init",
        "estimator_repr", "estimator_tags_renamed", "valid_tag_types", "estimator_cloneable", "mixin_order",
    ):  # fmt: skip
        getattr(checks, f"check_{name}")("HearEmbedder", embedder)


def test_the_commands_start_without_torch() -> None:
    code = "import sys; from hear_ssam import cli; cli.build_parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_labels_are_read_from_a_folder(sounds: Path, tmp_path: Path) -> None:
    found = read_labels(sounds)
    assert [row.label for row in found] == ["high"] * 6 + ["low"] * 6 + ["noise"] * 6
    with pytest.raises(HearSsamError, match="cannot be read as a CSV"):
        read_labels(sounds / "absent")
    for link in ("low", "high", "some.wav"):
        (tmp_path / link).symlink_to(sounds / link if link in CLASSES else sounds / "low" / "0.wav")
    with pytest.warns(UserWarning, match="left out 1 recordings beside the subfolders; move each"):
        assert len(read_labels(tmp_path)) == 12

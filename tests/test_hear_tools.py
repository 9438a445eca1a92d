"""The unmodified HEAR tools accept the package: installed apart, run for real in subprocesses."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hear_ssam import cli, heareval
from hear_ssam.heareval import INSTALL

ROOT = Path(__file__).resolve().parent.parent
RATE = 16000


def test_the_error_without_the_tools_says_how_to_install_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heareval, "installed", lambda name: False)
    assert cli.main(["heareval", "validator", "hear_ssam"]) == 2
    assert "--no-deps --ignore-requires-python" in capsys.readouterr().err


def test_the_readme_installs_the_same_versions() -> None:
    assert set(INSTALL) <= set((ROOT / "README.md").read_text().splitlines())


def call(*command: str | Path, cwd: Path, path: str = str(ROOT)) -> str:
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.tools
def test_validator(tools_bin: Path, tmp_path: Path) -> None:
    out = call(tools_bin / "python", "-m", "hear_ssam", "heareval", "validator", "hear_ssam", cwd=tmp_path)
    assert "Looks good!" in out


@pytest.mark.tools
def test_validator_by_its_own_command(tools_bin: Path, tmp_path: Path) -> None:
    # `hear-validator` imports TensorFlow only to ask whether the model is a tf.Module.
    (tmp_path / "tensorflow.py").write_text("class Module: pass\n")
    out = call(tools_bin / "hear-validator", "hear_ssam", cwd=tmp_path, path=f"{ROOT}{os.pathsep}{tmp_path}")
    assert "Looks good!" in out


@pytest.mark.tools
@pytest.mark.parametrize("kind", ["scene", "event"])
def test_embeddings_and_predictions(tools_bin: Path, tmp_path: Path, kind: str) -> None:
    make_task(tmp_path / "tasks" / kind, kind)
    heareval = (tools_bin / "python", "-m", "hear_ssam", "heareval")
    call(*heareval, "embeddings", "hear_ssam", "--tasks-dir", "tasks", cwd=tmp_path)
    embedded = tmp_path / "embeddings" / "hear_ssam" / kind
    rows, width = json.loads((embedded / "train.embedding-dimensions.json").read_text())
    assert np.fromfile(embedded / "train.embeddings.npy", np.float32).size == rows * width

    call(*heareval, "predictions", f"embeddings/hear_ssam/{kind}", "--grid-points", "1", cwd=tmp_path)
    scores = json.loads((embedded / "test.predicted-scores.json").read_text())["test"]
    assert scores["test_score"] > (0.9 if kind == "scene" else 0.0)  # tones and noise are easy to tell apart


@pytest.mark.tools
def test_heareval_and_our_probes_side_by_side(tools_bin: Path, tmp_path: Path) -> None:
    for name in ("other", "scene"):
        make_task(tmp_path / "tasks" / name, "scene")
    ours = (sys.executable, "-m", "hear_ssam", "evaluate", "--model-options", '{"model": "logmel"}')
    call(*ours, "--tasks-dir", "tasks", "--results-dir", "out", "--probe", "knn", cwd=tmp_path)
    embedded = (tmp_path / "out" / "embeddings").glob("*/*")
    side_by_side = (sys.executable, "-m", "benchmarks", "heareval", "--python", tools_bin / "python")
    table = call(*side_by_side, "--epochs", "3", *embedded, cwd=ROOT).splitlines()
    assert any(line.endswith("| other | scene |") for line in table)
    rows = [line.split(" | ") for line in table if line.startswith(("| heareval |", "| exact |", "| bf16 |"))]
    assert [row[0] for row in rows] == ["| heareval", "| exact", "| bf16"]
    assert rows[0][-2:] == rows[1][-2:]  # the exact probe's scores are heareval's


def make_task(folder: Path, kind: str) -> None:
    """A HEAR task: is it a tone or noise (scene), and where (event)?"""
    random = np.random.default_rng(0)
    metadata = {
        "task_name": f"tiny_{kind}",
        "version": "v1",
        "embedding_type": kind,
        "prediction_type": "multiclass" if kind == "scene" else "multilabel",
        "split_mode": "trainvaltest",
        "sample_duration": 1.0,
        "evaluation": ["top1_acc" if kind == "scene" else "event_onset_200ms_fms"],
        "splits": ["train", "valid", "test"],
        "evaluation_params": {
            "task_specific_param_grid": {"max_epochs": [40], "hidden_dim": [32]},
            "event_postprocessing_grid": {"median_filter_ms": [0], "min_duration": [0]},
        },
    }
    for split, clips in {"train": 24, "valid": 8, "test": 8}.items():
        (folder / str(RATE) / split).mkdir(parents=True)
        labels = {}
        for number in range(clips):
            label = ("tone", "noise")[number % 2]
            seconds = np.arange(RATE) / RATE
            tone = np.sin(2 * np.pi * random.uniform(300, 3000) * seconds)
            audio = 0.3 * (tone if label == "tone" else random.standard_normal(RATE)).astype(np.float32)
            if kind == "event":
                audio[: RATE // 2] *= 0.001
            soundfile.write(folder / str(RATE) / split / f"{number}.wav", audio, RATE)
            labels[f"{number}.wav"] = (
                [label] if kind == "scene" else [{"label": label, "start": 500.0, "end": 1000.0}]
            )  # fmt: skip
        (folder / f"{split}.json").write_text(json.dumps(labels))
    (folder / "labelvocabulary.csv").write_text("idx,label\n0,noise\n1,tone\n")
    (folder / "task_metadata.json").write_text(json.dumps(metadata))

"""Our two stages beside the unmodified heareval, in the same run on the same machine: equal to the last bit."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from hear_ssam.evaluation.embeddings import embed_task
from hear_ssam.evaluation.module import load_hear_model
from hear_ssam.evaluation.probe import run_probe
from hear_ssam.evaluation.tasks import read_task

from .test_hear_tools import call
from .tiny_tasks import write_task

EPOCHS = {"task_specific_param_grid": {"max_epochs": [60], "hidden_dim": [64], "check_val_every_n_epoch": [3]}}
TASKS = {
    "scene-folds": {"folds": 4, "evaluation": ["top1_acc", "mAP", "d_prime", "aucroc"]},
    "scene-multilabel": {"prediction_type": "multilabel", "evaluation": ["mAP", "aucroc", "d_prime", "top1_acc"]},
    "scene-pitch-by-loss": {"evaluation": ["pitch_acc", "chroma_acc"], "use_scoring_for_early_stopping": False},
    "event": {"embedding_type": "event", "clips": 9},
    "event-maestro-like": {
        "embedding_type": "event",
        "folds": 3,
        "evaluation": ["event_onset_50ms_fms", "event_onset_offset_50ms_20perc_fms"],
        "use_scoring_for_early_stopping": False,
        "evaluation_params": {**EPOCHS, "event_postprocessing_grid": {"median_filter_ms": [150], "min_duration": [50]}},
    },
}


@pytest.mark.tools
@pytest.mark.parametrize("kind", TASKS)
def test_both_stages_equal_heareval(tools_bin: Path, tmp_path: Path, kind: str) -> None:
    options = {"evaluation_params": EPOCHS, **TASKS[kind]}
    task = read_task(write_task(tmp_path / "tasks" / kind, **options))
    heareval = (tools_bin / "python", "-m", "hear_ssam", "heareval")
    call(*heareval, "embeddings", "tests.tiny_hear", "--tasks-dir", "tasks", cwd=tmp_path)
    theirs = Path("embeddings", "tests.tiny_hear", kind)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the subprocesses run
    try:
        ours = embed_task(load_hear_model("tests.tiny_hear"), task.folder, tmp_path / "ours" / kind)
        for split in task.splits:
            for name in (f"{split}.embeddings.npy", f"{split}.json"):
                assert (ours / name).read_bytes() == (tmp_path / theirs / name).read_bytes(), name
            for name in (f"{split}.embedding-dimensions.json", f"{split}.target-labels.pkl"):
                load = json.loads if name.endswith("json") else pickle.loads
                assert load((ours / name).read_bytes()) == load((tmp_path / theirs / name).read_bytes()), name

        # heareval's probe on our embeddings, our probe on heareval's
        call(*heareval, "predictions", f"ours/{kind}", cwd=tmp_path)
        result = run_probe(tmp_path / theirs, "heareval", 42)
    finally:
        torch.set_num_threads(threads)
    expected = json.loads((ours / "test.predicted-scores.json").read_text())
    log = tmp_path / "logs" / "ours" / kind / "lightning_logs"
    assert len(result.histories) == len(list(log.glob("version_*")))
    for training, history in enumerate(result.histories):
        with open(log / f"version_{training}" / "metrics.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["val_loss"]]
        assert [check["epoch"] for check in history] == [int(row["epoch"]) for row in rows]
        assert [check["val_loss"] for check in history] == [float(row["val_loss"]) for row in rows]
        if "val_score" in history[0]:
            np.testing.assert_equal([c["val_score"] for c in history], [float(row["val_score"]) for row in rows])
    for fold in result.folds:
        block = expected[fold.fold]
        wanted = {"epoch": block["epoch"], "validation_score": block["validation_score"], "loss": block["test_loss"]}
        assert fold.details == wanted
        for name, score in fold.scores.items():
            np.testing.assert_equal(np.float32(score), np.float32(block[f"test_{name}"]))

"""Writes HEAR tasks of sine tones, small enough to evaluate in a moment."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 16000
TONES = {"low": 300.0, "mid": 1200.0, "high": 4800.0}
# heareval reads this from the metadata too: tiny heads, few epochs
QUICK = {"task_specific_param_grid": {"hidden_dim": [8], "max_epochs": [6], "lr": [1e-2]}}


def write_task(folder: Path, *, folds: int = 0, clips: int = 6, rate: int = RATE, **metadata: Any) -> Path:
    """A scene task (or, with embedding_type="event", tones at known times); `folds` = 0 is train/valid/test."""
    splits = [f"fold{i:02d}" for i in range(folds)] or ["train", "valid", "test"]
    event = metadata.get("embedding_type") == "event"
    metadata = {
        "task_name": folder.name,
        "version": "1.0",
        "embedding_type": "scene",
        "prediction_type": "multilabel" if event else "multiclass",
        "split_mode": "presplit_kfold" if folds else "trainvaltest",
        "sample_duration": 1.0,
        "evaluation": ["event_onset_200ms_fms", "segment_1s_er"] if event else ["top1_acc", "mAP"],
        "evaluation_params": QUICK,
        "splits": splits,
        **metadata,
    }
    generator = np.random.default_rng(0)
    labels = sorted(TONES)
    folder.mkdir(parents=True)
    (folder / "task_metadata.json").write_text(json.dumps(metadata))
    (folder / "labelvocabulary.csv").write_text("idx,label\n" + "".join(f"{i},{x}\n" for i, x in enumerate(labels)))
    time = np.arange(rate) / rate
    for split in splits:
        (folder / str(rate) / split).mkdir(parents=True)
        rows: dict[str, list[Any]] = {}
        for number in range(clips):
            label = labels[number % len(labels)]
            tone = 0.3 * np.sin(2 * np.pi * TONES[label] * time)
            if event:
                start = float(generator.integers(1, 5)) * 100
                tone *= (time >= start / 1000) & (time < start / 1000 + 0.4)
                rows[f"{split}-{number}.wav"] = [{"label": label, "start": start, "end": start + 400}]
            else:
                rows[f"{split}-{number}.wav"] = [label]
            audio = tone + generator.normal(0, 0.01, rate)
            soundfile.write(folder / str(rate) / split / f"{split}-{number}.wav", audio, rate)
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder

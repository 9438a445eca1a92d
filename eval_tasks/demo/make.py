"""Makes the demo task again from its sources: `sources.csv` says which seconds of which file are which clip.

    python eval_tasks/demo/make.py FOLDER

FOLDER/<source> is a Debian package as `dpkg -x` leaves it, or a git checkout; README.md names the version of each.
The task: which kind of sound is this? A recording lies in one fold only, however many clips are cut from it.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import soundfile

from hear_ssam.audio import read_audio

RATE = 16_000
SECONDS = 2.0
BITRATE = 0.928  # libsndfile's scale: 24 kb/s
TASK = Path(__file__).parent / "tasks" / "sound_kinds-v2.0-full"


def main(folder: Path) -> None:
    with open(TASK / "sources.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if missing := sorted({row["source"] for row in rows if not (folder / row["source"]).is_dir()}):
        sys.exit(f"{folder} lacks {', '.join(missing)}; README.md says where they come from.")
    folds: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        folds.setdefault(row["fold"], {})[row["clip"]] = [row["label"]]
        start, length = round(float(row["start"]) * RATE), round(SECONDS * RATE)
        audio = read_audio(folder / row["source"] / row["file"], RATE)[start : start + length].clip(-1, 1)
        target = TASK / str(RATE) / row["fold"] / row["clip"]
        target.parent.mkdir(parents=True, exist_ok=True)
        audio = np.pad(audio, (0, length - len(audio)))
        soundfile.write(target, audio, RATE, format="OGG", subtype="OPUS", compression_level=BITRATE)
        if soundfile.info(target).frames != length:
            sys.exit(f"{target}: the encoder did not keep the length")
    for fold, labels in folds.items():
        (TASK / f"{fold}.json").write_text(json.dumps(dict(sorted(labels.items())), indent=1) + "\n")
    vocabulary = sorted({row["label"] for row in rows})
    table = "".join(f"{index},{label}\n" for index, label in enumerate(vocabulary))
    (TASK / "labelvocabulary.csv").write_text("idx,label\n" + table)
    metadata = {
        "task_name": "sound_kinds",
        "version": "v2.0",
        "mode": "full",
        "embedding_type": "scene",
        "prediction_type": "multiclass",
        "split_mode": "presplit_kfold",
        "nfolds": len(folds),
        "splits": sorted(folds),
        "sample_duration": SECONDS,
        "evaluation": ["top1_acc", "mAP"],
        "download_urls": [],
    }
    (TASK / "task_metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))

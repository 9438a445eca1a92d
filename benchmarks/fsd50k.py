"""What a task of FSD50K's size takes (51,197 clips, 200 labels), measured in two parts and added up.

    python -m benchmarks fsd50k > benchmarks/fsd50k.md
    python -m benchmarks fsd50k --audio MY_RECORDINGS --model ssam_base --probes exact

Embeddings: real clips (the shipped demo's, again and again, or --audio), each in a process that embeds the task. Probe:
random embeddings of full size on disk, a head of heareval's grid for a few epochs. What follows from both for the whole
task is an extrapolation, and says so: clips of FSD50K are 7.6 s long in the mean, and a training ends when it likes.
"""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from hear_ssam.audio import find_audio
from hear_ssam.paths import shipped, write_whole

from . import plain_parser
from .collections import measure
from .cpu import facts, heading

SPLITS = {"train": 36_796, "valid": 4_170, "test": 10_231}
LABELS = 200
MEAN_SECONDS = 7.6  # of a clip of FSD50K (Fonseca et al. 2022, table 2: 108.3 h)
GRID_POINTS, EPOCHS = 8, (60, 500)  # heareval's: the least is 20 validations without a better one

EMBED = """import torch; from pathlib import Path
from hear_ssam.evaluation.embeddings import embed_task; from hear_ssam.evaluation.module import judged
import hear_ssam; hear = judged(hear_ssam.load_model(sys.argv[3]), "cpu")
embed_task(hear, Path(sys.argv[1]), Path(sys.argv[2]), resample=True)"""
PROBE = """from pathlib import Path; from hear_ssam.evaluation.probe import run_probe
run_probe(Path(sys.argv[1]), "heareval", 0, bf16=sys.argv[2] == "bf16")"""


def describe(folder: Path, clips: dict[str, list[str]], epochs: int, validate: int) -> None:
    """The files that say what a task is: `clips` of each split, with five labels in 200 each."""
    folder.mkdir(parents=True)
    grid = {"hidden_layers": [1], "initialization": ["xavier_uniform"], "lr": [1e-3], "max_epochs": [epochs],
            "check_val_every_n_epoch": [validate]}  # fmt: skip
    metadata = {
        "task_name": "fsd50k-sized", "version": "1", "embedding_type": "scene", "prediction_type": "multilabel",
        "split_mode": "trainvaltest", "sample_duration": None, "splits": list(clips),
        "evaluation": ["mAP", "d_prime", "aucroc", "top1_acc"],
        "evaluation_params": {"task_specific_param_grid": grid},
    }  # fmt: skip
    write_whole(folder / "task_metadata.json", json.dumps(metadata))
    vocabulary = "".join(f"{i},label {i}\n" for i in range(LABELS))
    write_whole(folder / "labelvocabulary.csv", f"idx,label\n{vocabulary}")
    random = np.random.default_rng(0)
    for split, names in clips.items():
        labels = {name: [f"label {i}" for i in random.choice(LABELS, 5, False)] for name in names}
        write_whole(folder / f"{split}.json", json.dumps(labels))
        write_whole(folder / f"{split}.target-labels.pkl", pickle.dumps(list(labels.values())))


def random_embeddings(folder: Path, width: int, epochs: int, validate: int) -> None:
    """An embedding folder of full size: float32 rows without any structure."""
    describe(folder, {split: [f"{i}.wav" for i in range(n)] for split, n in SPLITS.items()}, epochs, validate)
    random = np.random.default_rng(1)
    for split, count in SPLITS.items():
        write_whole(folder / f"{split}.embedding-dimensions.json", json.dumps([count, width]))
        with open(folder / f"{split}.embeddings.npy", "wb") as file:
            for start in range(0, count, 4096):
                random.standard_normal((min(4096, count - start), width), np.float32).tofile(file)


def real_clips(folder: Path, audio: list[Path], count: int) -> float:
    """A task of `count` real clips, links to `audio`; returns their seconds."""
    parts = {"train": count - 2 * (count // 5), "valid": count // 5, "test": count // 5}
    names = {split: [f"{i}{audio[i % len(audio)].suffix}" for i in range(n)] for split, n in parts.items()}
    describe(folder, names, 3, 3)
    length = {file: soundfile.info(file).duration for file in audio}
    seconds = 0.0
    for split, listed in names.items():
        place = folder / "16000" / split
        place.mkdir(parents=True)
        for i, name in enumerate(listed):
            os.symlink(audio[i % len(audio)].resolve(), place / name)
            seconds += length[audio[i % len(audio)]]
    return seconds


def main(arguments: list[str]) -> int:
    parser = plain_parser("fsd50k", __doc__)
    parser.add_argument("--audio", nargs="+", metavar="PATH", help="default: the demo's clips")
    parser.add_argument("--clips", type=int, default=4000, help="to embed (default 4000)")
    parser.add_argument("--model", default="ssam_tiny")
    parser.add_argument("--width", type=int, default=1920, help="of the random embeddings (default 1920)")
    parser.add_argument("--probes", nargs="+", default=["exact", "bf16"], choices=["exact", "bf16"])
    parser.add_argument("--epochs", type=int, default=6, help="of the head (default 6)")
    args: Any = parser.parse_args(arguments)
    print(heading("A task of FSD50K's size", facts(1) | {"made with": json.dumps(vars(args))}))
    print("| measured | seconds | of the CPU | peak MB |\n|---|---|---|---|")
    audio = find_audio(args.audio or sorted((shipped("eval_tasks") / "demo" / "tasks").glob("*/16000")))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds = real_clips(folder / "task", audio, args.clips)
        found = measure(EMBED, folder / "task", folder / "embeddings", args.model)
        what = f"{args.clips:,} clips, {seconds / 3600:.2f} h, embedded by {args.model}"
        print(f"| {what} | {found.seconds:.0f} | {found.cpu:.0f} | {found.peak:.0f} |", flush=True)
        whole = found.cpu * MEAN_SECONDS * sum(SPLITS.values()) / seconds
        lines = [f"- embeddings: {whole / 3600:.1f} h of one CPU"]
        random_embeddings(folder / "random", args.width, args.epochs, 3)
        for probe in args.probes:
            found = measure(PROBE, folder / "random", probe)
            what = f"{probe}: one head, {args.epochs} epochs, {sum(SPLITS.values()):,} x {args.width}, {LABELS} labels"
            print(f"| {what} | {found.seconds:.0f} | {found.cpu:.0f} | {found.peak:.0f} |", flush=True)
            low, high = (GRID_POINTS * found.cpu * epochs / args.epochs / 3600 for epochs in EPOCHS)
            lines.append(
                f"- `--probe {probe}`, heareval's {GRID_POINTS} grid points: {low:.1f} h of one CPU where each stops "
                f"after {EPOCHS[0]} epochs, {high:.1f} h after {EPOCHS[1]}"
            )
    print("\nExtrapolated to the whole task, not measured:\n", *lines, sep="\n")
    return 0
